#!/usr/bin/env bash
# From a bare checkout to a trained, measured model on the data set in data/debian-packages.
# Needs Python >= 3.11 and a package index. Words on the command line are settings:
#   bash launch/quickstart.sh seed=1 run_dir=runs/second
#   XMCDIST_PROCESSES   ranks to start (default: one a GPU; two without a GPU)
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$root"
use_venv minilm dev

gpus=0
if command -v nvidia-smi >/dev/null 2>&1; then
  gpus="$("$venv/bin/python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null || echo 0)"
  ((gpus > 0)) || echo "there may be a GPU, but this torch build does not use it (see README, GPUs); training on the CPU"
fi
processes="${XMCDIST_PROCESSES:-$((gpus > 0 ? gpus : 2))}"
settings=(experiment=quickstart)
((gpus == 0)) || settings+=(engine=ddp)

threads="$(at_least_one $(($(cores) / processes)))"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}" NUMBA_NUM_THREADS="${NUMBA_NUM_THREADS:-$threads}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}" PYTHONUNBUFFERED=1

if ((processes == 1)); then
  exec "$venv/bin/python" -m xmcdist train "${settings[@]}" "$@"
fi
# This is `accelerate launch`, which with --cpu would start one process and
# not say so; the variable starts them all over gloo.
((gpus > 0)) || export ACCELERATE_USE_CPU=true
port="$("$venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
exec "$venv/bin/python" -m accelerate.commands.launch --multi_gpu --num_processes "$processes" --num_machines 1 \
  --mixed_precision no --dynamo_backend no --main_process_ip 127.0.0.1 --main_process_port "$port" \
  -m xmcdist train "${settings[@]}" "$@"
