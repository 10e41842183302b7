#!/usr/bin/env bash
# One Slurm job for each run of a sweep, in Hydra's own notation:
#   slurm/sweep.sh seed=1,2,3 matcher.beam=10,20 dataset.path=DIR      # six jobs
#   slurm/sweep.sh --name beams --sbatch "--gpus-per-node=4" 'matcher.beam=range(10,40,10)' experiment=quickstart
#   slurm/sweep.sh --table runs/beams                                  # measures of all its runs, so far
#   --name NAME       folder of the sweep in $XMCDIST_RUNS (default: sweep-<date>); run folders in it are named by
#                     the settings that change; the same sweep with the same name goes on
#   --sbatch OPTIONS  options of sbatch, parted by blanks (default: gpu_job of slurm/site.env)
#   --dry-run         only say what would be submitted
# Settings are checked before anything is submitted. Jobs are slurm/train.sbatch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/job.sh
source slurm/job.sh
usage() { sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' slurm/sweep.sh; }

python="$(python_of_site)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
name="sweep-$(date +%Y%m%d-%H%M%S)" options=("${gpu_job[@]}") dry_run="" settings=()
while (($#)); do
  case "$1" in
    -h | --help) usage; exit ;;
    --name) name="${2:?--name needs a name}"; shift 2 ;;
    --sbatch) read -ra options <<< "${2:?--sbatch needs options}"; shift 2 ;;
    --table) exec "$python" slurm/settings.py table "${2:?--table needs a folder}" ;;
    --dry-run) dry_run=1; shift ;;
    -*) die "unknown option $1; see slurm/sweep.sh --help" ;;
    *) settings+=("$1"); shift ;;
  esac
done
((${#settings[@]})) || { usage; exit 2; }

folder="${XMCDIST_RUNS:-$PWD/runs}/$name"
list="$(mktemp)"
trap 'rm -f "$list"' EXIT
"$python" slurm/settings.py expand "${settings[@]}" > "$list"
jobs=0
while IFS= read -rd '' run && IFS= read -rd '' count; do
  words=()
  for ((i = 0; i < count; i++)); do
    IFS= read -rd '' word
    words+=("$word")
  done
  submit=(sbatch --parsable --job-name="$name" "${options[@]}" slurm/train.sbatch "${words[@]}")
  if [[ -n "$dry_run" ]]; then
    echo "XMCDIST_RUN_DIR=$folder/$run ${submit[*]@Q}"
  elif [[ "$folder/$run/results.json" -nt "$folder/$run/config.json" ]]; then
    echo "$folder/$run is finished"
  else
    echo "job $(XMCDIST_RUN_DIR="$folder/$run" "${submit[@]}"): $folder/$run"
  fi
  jobs=$((jobs + 1))
done < "$list"
echo "$jobs runs. To watch: squeue --me --name=$name.  Their measures: slurm/sweep.sh --table $folder"
