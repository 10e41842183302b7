#!/usr/bin/env bash
# Start this node's ranks. Under srun the Slurm variables say which node this is; without them
# it is a single machine:   NPROC=4 launch/node.sh experiment=quickstart
#   NPROC             ranks on this node (default: one a GPU that Slurm gave, else 1)
#   XMCDIST_MAX_RESTARTS  times that all ranks start again, from the last checkpoint, when one of them
#                     has died (default 0: the job ends, naming the dead rank)
#   XMCDIST_GRACE_S   seconds the ranks have after a signal before they are killed (default 30)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${XMCDIST_VENV:-$root/.venv}"
python="$venv/bin/python"
[[ -x "$python" ]] || python=python # an environment that the site made and activated
cd "$root"

ranks="${NPROC:-${SLURM_GPUS_ON_NODE:-1}}"
threads=$((${SLURM_CPUS_PER_TASK:-$(nproc)} / ranks))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}"
export NUMBA_NUM_THREADS="${NUMBA_NUM_THREADS:-$OMP_NUM_THREADS}"
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}" TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"

rendezvous=(--node-rank "${SLURM_NODEID:-0}" --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}")
if ((${XMCDIST_MAX_RESTARTS:-0} > 0)); then
  # Ranks that start again must not meet in the store of those that died: each attempt opens its own.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  rendezvous=(--rdzv-backend c10d --rdzv-id "${SLURM_JOB_ID:-local}" --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}")
fi

# Unless told to handle them, the launcher dies of USR1 and USR2 and leaves its ranks behind.
exec "$python" -m torch.distributed.run \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
  --shutdown-timeout "${XMCDIST_GRACE_S:-30}" \
  --nnodes "${SLURM_NNODES:-1}" --nproc-per-node "$ranks" "${rendezvous[@]}" \
  --max-restarts "${XMCDIST_MAX_RESTARTS:-0}" \
  -m xmcdist train "$@"
