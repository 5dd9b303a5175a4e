#!/usr/bin/env bash
# Sets up .venv, prunes the demo model that comes with the package to 50 % in three rounds, and evaluates it against the dense one.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1 # everything the demo needs is in the package
obsprune prune demo --sparsity 0.5 --iters 3 --eval heldout --force "$@"
obsprune eval --compare demo
