#!/usr/bin/env bash
# The stages of one run as a chain of Slurm jobs, so that GPUs are held only while they are needed:
#   slurm/pipeline.sh --cpu "--partition=cpu --cpus-per-task=32 --mem=120G" \
#     --gpu "--partition=gpu --nodes=2 --gpus-per-node=8 --cpus-per-task=64" dataset.path=DIR engine=ddp
#     1 tree    a CPU node    data, TF-IDF, label tree
#     2 linear  a CPU node    rankers on TF-IDF alone, the baseline
#     3 match   GPU nodes     the encoder, fine-tuned level by level
#     4 rank    CPU nodes     rankers on TF-IDF and embeddings
#     5 end     a CPU node    model folder, measures, report
#   --name NAME     of the jobs, and of the run folder in $XMCDIST_RUNS (default: pipeline-<date>); the same
#                   command with the same name goes on with what is missing
#   --cpu OPTIONS   options of sbatch for CPU jobs, parted by blanks (default: cpu_job of slurm/site.env)
#   --gpu OPTIONS   the same for the job of the matcher (default: gpu_job)
#   --rank OPTIONS  the same for the job of the rankers (default: as --cpu)
#   --dry-run       only say what would be submitted
# A job starts when the one before it has ended well; when one fails, those after it are removed from the queue.
# Each is slurm/train.sbatch, so each saves, requeues and goes on by itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/job.sh
source slurm/job.sh
usage() { sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' slurm/pipeline.sh; }

python="$(python_of_site)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
name="pipeline-$(date +%Y%m%d-%H%M%S)" cpu=("${cpu_job[@]}") gpu=("${gpu_job[@]}") rank="" dry_run="" settings=()
while (($#)); do
  case "$1" in
    -h | --help) usage; exit ;;
    --name) name="${2:?--name needs a name}"; shift 2 ;;
    --cpu) read -ra cpu <<< "${2:?--cpu needs options}"; shift 2 ;;
    --gpu) read -ra gpu <<< "${2:?--gpu needs options}"; shift 2 ;;
    --rank) rank="${2:?--rank needs options}"; shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    -*) die "unknown option $1; see slurm/pipeline.sh --help" ;;
    until=*) die "$1: the jobs of the chain set until themselves" ;;
    *) settings+=("$1"); shift ;;
  esac
done
((${#settings[@]})) || { usage; exit 2; }
rank_job=("${cpu[@]}")
if [[ -n "$rank" ]]; then read -ra rank_job <<< "$rank"; fi

run_dir="${XMCDIST_RUNS:-$PWD/runs}/$name"
for word in "${settings[@]}"; do
  [[ "$word" != run_dir=* ]] || run_dir="${word#run_dir=}"
done
export XMCDIST_RUN_DIR="$run_dir"
stages="$("$python" slurm/settings.py stages "${settings[@]}")"

before="" ids=()
for stage in $stages end; do
  case "$stage" in
    match) options=("${gpu[@]}") ;;
    rank) options=("${rank_job[@]}") ;;
    *) options=("${cpu[@]}") ;;
  esac
  words=("${settings[@]}")
  # How label rows are shared out is for the processes of the matcher's job; no other has rows of it.
  [[ "$stage" == match ]] || words+=(engine.label_shards=null)
  [[ "$stage" == end ]] || words+=("until=$stage")
  submit=(sbatch --parsable --job-name="$name-$stage" "${options[@]}")
  [[ -z "$before" ]] || submit+=(--dependency="afterok:$before" --kill-on-invalid-dep=yes)
  submit+=(slurm/train.sbatch "${words[@]}")
  if [[ -n "$dry_run" ]]; then
    echo "${submit[*]@Q}"
    before="<$stage>"
    continue
  fi
  before="$("${submit[@]}")"
  before="${before%%;*}" # on a federation the cluster's name follows
  ids+=("$before")
  echo "job $before: $stage"
done
((${#ids[@]})) || exit 0
echo "run folder: $run_dir"
echo "to watch:   squeue --jobs=$(IFS=,; echo "${ids[*]}"); tail -f $run_dir/run.log"
echo "to stop:    scancel ${ids[*]}"
