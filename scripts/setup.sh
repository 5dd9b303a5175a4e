# Sourced by the other scripts: makes .venv with pinned packages, or keeps it when nothing changed since.
# OBSPRUNE_PYTHON names another Python (3.11 or newer); OBSPRUNE_VENV another place for the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${OBSPRUNE_VENV:-.venv}"
stamp="$venv/.installed"
if [ ! -f "$stamp" ] || ! cat pyproject.toml constraints.txt | cmp -s - "$stamp"; then
  python="${OBSPRUNE_PYTHON:-$(command -v python3.11 || command -v python3.12 || command -v python3)}"
  echo "making $venv with $("$python" --version)" >&2
  "$python" -m venv --clear "$venv"
  # torch by its exact pin, before anything that would pull another build of it
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
  cat pyproject.toml constraints.txt > "$stamp"
fi
export PATH="$PWD/$venv/bin:$PATH"
