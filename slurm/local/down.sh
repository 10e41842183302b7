#!/usr/bin/env bash
# Stop the Slurm that up.sh started in FOLDER, and its jobs:   bash slurm/local/down.sh FOLDER
# Only processes that the pid files in FOLDER name are stopped; the folder stays, with its logs.
set -euo pipefail

usage() { sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
case "${1:---help}" in -h | --help) usage; exit ;; esac
root="$(cd "$1" && pwd)"
export SLURM_CONF="$root/etc/slurm.conf"
[[ -f "$SLURM_CONF" ]] || { echo "down.sh: error: $root holds no etc/slurm.conf of up.sh" >&2; exit 1; }

# Jobs first: without a slurmd nobody would end their processes.
mapfile -t jobs < <(timeout 20 squeue -h -o %A 2>/dev/null | sort -u || true)
if ((${#jobs[@]})); then
  timeout 20 scancel "${jobs[@]}" || true
  for _ in $(seq 60); do
    [[ -n "$(timeout 20 squeue -h -o %A 2>/dev/null || true)" ]] || break
    sleep 1
  done
fi

stopped=()
for pid_file in "$root"/run/slurmd.n*.pid "$root"/run/slurmctld.pid "$root"/munge/munged.pid; do
  [[ -s "$pid_file" ]] || continue
  pid="$(< "$pid_file")"
  name="$(basename "$pid_file" .pid)"
  # A number left by a machine that was switched off may be another program's by now.
  if [[ "$(cat "/proc/$pid/comm" 2>/dev/null)" == "${name%.n?}" ]]; then
    kill "$pid" && stopped+=("$pid")
  fi
done
for pid in "${stopped[@]}"; do
  for _ in $(seq 100); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
done
echo "stopped ${#stopped[@]} daemons of $root"
