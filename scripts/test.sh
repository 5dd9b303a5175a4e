#!/usr/bin/env bash
# Sets up .venv, then lints, checks types and runs the tests. --all adds the tests marked slow; other words go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
select=(-m "not slow")
if [ "${1:-}" = "--all" ]; then
  select=()
  shift
fi
ruff check
ruff format --check
mypy
# worksteal: the slow tests are the last ones, and one worker must not be left alone with them
python -m pytest -n "${OBSPRUNE_WORKERS:-auto}" --dist worksteal "${select[@]}" "$@"
