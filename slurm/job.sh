# Sourced by the batch files and by those that submit them: the checkout, the site, the meeting point of the ranks.
# shellcheck shell=bash

die() { echo "$(basename "${0}"): error: $*" >&2; exit 1; }

# Settings of the cluster. The arrays are options: srun_options for srun, container in front of what it
# starts, cpu_job and gpu_job for the sbatch of pipeline.sh and sweep.sh.
# shellcheck disable=SC2034  # the files that source this one use them
srun_options=() container=() cpu_job=() gpu_job=()
site="${XMCDIST_SITE:-slurm/site.env}"
if [[ -e "$site" ]]; then
  set +u # what `module load` runs does not expect it
  # shellcheck source=/dev/null
  source "$site"
  set -u
elif [[ -n "${XMCDIST_SITE:-}" ]]; then
  die "XMCDIST_SITE=$XMCDIST_SITE does not exist"
fi

# The Python environment of launch/node.sh.
python_of_site() {
  local python="${XMCDIST_VENV:-$PWD/.venv}/bin/python"
  [[ -x "$python" ]] || python=python
  echo "$python"
}

# Where the ranks of all nodes meet: on the first node, at a port that no other job of the node has.
rendezvous() {
  local head
  head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
  if [[ -z "${MASTER_ADDR:-}" ]] && ! getent hosts "$head" >/dev/null; then
    MASTER_ADDR="$(scontrol show node -o "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')"
  fi
  MASTER_ADDR="${MASTER_ADDR:-$head}"
  MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
  export MASTER_ADDR MASTER_PORT
}

job_state() { scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p'; }

# quoted WORD: as one string of Hydra's grammar.
quoted() {
  local escaped="${1//\\/\\\\}"
  echo "'${escaped//\'/\\\'}'"
}
