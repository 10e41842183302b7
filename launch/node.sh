#!/usr/bin/env bash
# Start this node's ranks. Under srun the Slurm variables say which node this is; without them
# it is a single machine:   NPROC=4 launch/node.sh experiment=quickstart
#   NPROC             ranks on this node (default: one a GPU that Slurm gave, else 1)
#   XMCDIST_COMMAND   what they run (default: train); words on the command line are its settings
#   XMCDIST_IFNAME    network interface that ranks of several nodes talk over (default: the one that leads
#                     to the first node); GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME say it for one library
#   XMCDIST_LOG_DIR   folder for a log file per rank (default: none, all goes to the terminal)
#   XMCDIST_MAX_RESTARTS  times that all ranks start again, from the last checkpoint, when one of them
#                     has died (default 0: the job ends, naming the dead rank)
#   XMCDIST_GRACE_S   seconds the ranks have after a signal before they are killed (default 30)
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;; esac

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${XMCDIST_VENV:-$root/.venv}"
python="$venv/bin/python"
[[ -x "$python" ]] || python=python # an environment that the site made and activated
cd "$root"

nodes="${SLURM_NNODES:-1}" node="${SLURM_NODEID:-0}" head="${MASTER_ADDR:-127.0.0.1}" port="${MASTER_PORT:-29500}"
ranks="${NPROC:-${SLURM_GPUS_ON_NODE:-1}}"
threads=$((${SLURM_CPUS_PER_TASK:-$(nproc)} / ranks))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}"
export NUMBA_NUM_THREADS="${NUMBA_NUM_THREADS:-$OMP_NUM_THREADS}"
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}" TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"

# The interface by which this machine reaches an address, or that has it.
interface_to() {
  local address device
  address="$(getent ahosts "$1" | awk 'NR == 1 {print $1}')"
  device="$(ip -o route get "$address" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p')"
  if [[ "$device" == lo && "$address" != 127.* ]]; then
    device="$(ip -o address show to "$address" | awk 'NR == 1 {print $2}')"
  fi
  echo "$device"
}

if ((nodes > 1)); then
  # By itself gloo takes the address that the machine's own name stands for, often one of the loopback.
  chosen="${XMCDIST_IFNAME:-}"
  [[ -n "$chosen" ]] || chosen="$(interface_to "$head" || true)"
  if [[ -n "$chosen" ]]; then export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$chosen}"; fi
  # NCCL finds the fast network by itself, unless told.
  if [[ -n "${XMCDIST_IFNAME:-}" ]]; then export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$XMCDIST_IFNAME}"; fi
fi

rendezvous=(--node-rank "$node" --master-addr "$head" --master-port "$port" --rdzv-id "${SLURM_JOB_ID:-local}")
if ((${XMCDIST_MAX_RESTARTS:-0} > 0)); then
  # Ranks that start again must not meet in the store of those that died: each attempt opens its own.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  id="${SLURM_JOB_ID:-local}-${SLURM_RESTART_COUNT:-0}"
  rendezvous=(--rdzv-backend c10d --rdzv-id "$id" --rdzv-endpoint "$head:$port")
  # A node would tell the others its name, which need not be that of an address they know.
  [[ "$head" != 127.* ]] || rendezvous+=(--local-addr "$head")
fi

logs=()
if [[ -n "${XMCDIST_LOG_DIR:-}" ]]; then
  mkdir -p "$XMCDIST_LOG_DIR"
  logs=(--log-dir "$XMCDIST_LOG_DIR/node-$node" --tee 3)
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="${TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE:-[\${rank\}] }"
fi

# launcher SIGNALS: what starts the ranks, and takes these signals as a request to end them.
launcher() {
  exec "$python" -m torch.distributed.run --signals-to-handle "$1" --shutdown-timeout "${XMCDIST_GRACE_S:-30}" \
    --nnodes "$nodes" --nproc-per-node "$ranks" "${rendezvous[@]}" "${logs[@]}" \
    --max-restarts "${XMCDIST_MAX_RESTARTS:-0}" -m xmcdist "${XMCDIST_COMMAND:-train}" "${settings[@]}"
}
settings=("$@")

if [[ -z "${SLURM_STEP_ID:-}" ]]; then
  # Unless told to handle them, the launcher dies of USR1 and USR2 and leaves its ranks behind.
  launcher SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2
fi

# Slurm gives a signal to every process of a step, some of them twice, and the launcher gives up its
# ranks at the third. So it is deaf to these, the ranks take them from Slurm, and this shell tells it,
# once, that they will end: with SIGURG, which the ranks, to whom it passes it on, do not notice.
(trap '' TERM USR1 USR2; launcher SIGURG,SIGINT,SIGQUIT) &
pid=$!
# mark NAME: for the batch file, which cannot tell one end from another by srun's status.
mark() { [[ -z "${XMCDIST_LOG_DIR:-}" ]] || touch "$XMCDIST_LOG_DIR/$1"; }
asked=0
# shellcheck disable=SC2317  # the trap calls it
ask() {
  ((asked)) || kill -s URG "$pid" 2>/dev/null || true
  asked=1
}
trap ask TERM USR1 USR2
status=0
wait "$pid" || status=$?
while kill -0 "$pid" 2>/dev/null; do # a trapped signal ends `wait` early
  status=0
  wait "$pid" || status=$?
done
if ((asked && status != 0)); then
  # Its status does not tell ranks that have saved from ranks that failed. They were asked to end, and srun must not
  # end those of other nodes for it.
  mark asked-to-end
  exit 0
fi
((status == 0)) || mark failed
exit "$status"
