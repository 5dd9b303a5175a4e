#!/usr/bin/env bash
# Builds the sdist and, from it, the wheel; installs the wheel into a fresh environment and tries it there, away from the
# source: what it must hold, the README's first commands, and tests. dist/ gets only what has passed.
# OBSPRUNE_PYTHON names another Python (3.11 or newer). Takes minutes, most of them for downloads.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source="$PWD"
python="${OBSPRUNE_PYTHON:-$(command -v python3.11 || command -v python3.12 || command -v python3)}"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/venv"
export PATH="$scratch/venv/bin:$PATH"
install=(python -m pip install --quiet --disable-pip-version-check -c constraints.txt)
"${install[@]}" build torch # torch by its exact pin, before anything that would pull another build of it
python -m build --outdir "$scratch/dist"
"${install[@]}" "$(echo "$scratch"/dist/*.whl)[test]"
cp -r tests pyproject.toml "$scratch" # of pyproject.toml, pytest's settings

cd "$scratch"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
python - <<'HELD'
from importlib.resources import files

held = files("obsprune")
assert "site-packages" in str(held), held
wanted = ["py.typed", "demo/model.safetensors", "presets/best.yaml", "recipes/README.md", "recipes/sparse-recovery/bound.yaml"]
wanted += ["report/schema.json", "report/templates/base.html.j2", "report/templates/style.css"]
missing = [name for name in wanted if not held.joinpath(name).is_file()]
assert not missing, missing
HELD
obsprune --version
obsprune prune demo --preset fast -o sparse
obsprune eval sparse --compare demo
obsprune inspect sparse > /dev/null
obsprune recipe list
obsprune recipe run sparse-recovery/bound --smoke
python -m pytest -n "${OBSPRUNE_WORKERS:-auto}" -m "not slow" tests/core tests/solvers tests/cli tests/test_presets.py tests/test_trees.py

mkdir -p "$source/dist"
cp "$scratch"/dist/* "$source/dist"
