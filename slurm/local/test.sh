#!/usr/bin/env bash
# Try everything in slurm/ on a real Slurm of four nodes on this machine: installs, starts, tests, stops.
#   bash slurm/local/test.sh [OPTIONS OF PYTEST]        such as: -k limit -x
# Needs root and, where slurm-wlm and munge are missing, apt-get; about half an hour on two cores. Words go to pytest.
# What it leaves behind when a test fails (logs of jobs, run folders, Slurm's own logs) is in the folder it names.
#   XMCDIST_SLURM_SCRATCH   that folder (default: a new one in the temporary folder)
case "${1:-}" in -h | --help) sed -n '2,/^case/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;; esac
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../launch/common.sh"
cd "$root"
use_venv dev
export PATH="$venv/bin:$PATH"

scratch="${XMCDIST_SLURM_SCRATCH:-$(mktemp -d "${TMPDIR:-/tmp}/slurm.XXXXXX")}"
bash slurm/local/up.sh "$scratch"
finish() {
  status=$?
  bash slurm/local/down.sh "$scratch"
  if ((status == 0)) && [[ -z "${XMCDIST_SLURM_SCRATCH:-}" ]]; then rm -rf "$scratch"; else echo "logs are in $scratch"; fi
  exit "$status"
}
trap finish EXIT

export SLURM_CONF="$scratch/etc/slurm.conf" HF_HUB_OFFLINE=1 WANDB_MODE=offline WANDB_SILENT=true
# Kernels are compiled once, here, and not by four ranks under a time limit.
python -m xmcdist train experiment=quickstart encoder=tiny 'matcher.steps=[2]' run_dir="$scratch/first" >/dev/null 2>"$scratch/first.log" \
  || { tail -n 50 "$scratch/first.log"; exit 1; }
python -m pytest -n 0 -m slurm --basetemp "$scratch/tests" --durations=0 tests/slurm "$@"
