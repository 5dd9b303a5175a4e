#!/usr/bin/env bash
# Sets up .venv and builds the documentation into site/; every warning is an error. `scripts/docs.sh serve` shows it while
# it is written.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export NO_MKDOCS_2_WARNING=1 # about its successor, in twelve lines
exec mkdocs "${@:-build}" --strict
