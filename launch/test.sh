#!/usr/bin/env bash
# From a bare checkout to a green test run: lint, types, tests. Words on the command line go to pytest:
#   bash launch/test.sh tests/trees -k balance
#   XMCDIST_TEST_WORKERS   test processes (default: two more than cores, at most 4; 0: all in one, for a debugger)
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$root"
use_venv dev
export PATH="$venv/bin:$PATH"

workers="$(($(cores) + 2))" # many tests mostly wait; asked before OMP_NUM_THREADS is set, which nproc heeds
workers="${XMCDIST_TEST_WORKERS:-$((workers > 4 ? 4 : workers))}"

# Nothing of a test leaves this machine; distributed tests talk over the loopback.
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}" HF_HUB_OFFLINE=1 WANDB_MODE=offline WANDB_SILENT=true
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$root/build/torch_extensions}" # compiled once, kept
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" NUMBA_NUM_THREADS="${NUMBA_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false

step() { echo "== $*"; "$@"; }
step python -m ruff check .
step python -m ruff format --check .
step python -m mypy
if command -v shellcheck >/dev/null 2>&1; then
  step shellcheck -x launch/*.sh slurm/*.sh slurm/*.sbatch slurm/local/*.sh .ci/run
fi
# Which tests keep to one worker: tests/conftest.py.
step python -m pytest -n "$workers" --dist loadgroup "$@"
