#!/usr/bin/env bash
# A real Slurm with four nodes n1..n4 on this one machine, to try jobs on:
#   bash slurm/local/up.sh [FOLDER]     FOLDER is its scratch (default: a new one in the temporary folder)
#   export SLURM_CONF=FOLDER/etc/slurm.conf; sinfo
#   bash slurm/local/down.sh FOLDER     stops it; the folder can go then
# Needs root; on Debian and Ubuntu it installs slurm-wlm and munge if they are missing. Partitions: main (default;
# pre-empted and requeued by urgent), graced (the same with a minute of grace), urgent.
#   XMCDIST_SLURM_PORT   first of eight ports on the loopback (default 16817)
set -euo pipefail

usage() { sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
die() { echo "up.sh: error: $*" >&2; exit 1; }
case "${1:-}" in -h | --help) usage; exit ;; esac

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
((EUID == 0)) || die "a Slurm with nodes of its own needs root; in a container you usually are"
if ! { command -v slurmctld && command -v slurmd && command -v munged; } >/dev/null; then
  command -v apt-get >/dev/null || die "slurmctld, slurmd and munged are not all installed, and there is no apt-get to get them"
  echo "installing slurm-wlm and munge"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
fi

root="${1:-$(mktemp -d "${TMPDIR:-/tmp}/slurm.XXXXXX")}"
[[ "$root" != *[[:space:]\|]* ]] || die "$root: slurm.conf takes no folder with blanks in its name"
mkdir -p "$root"
root="$(cd "$root" && pwd)"
# A socket's name has 108 bytes at most.
((${#root} <= 80)) || die "$root is too long a name for the sockets in it: choose a shorter folder"
for pid_file in "$root"/run/*.pid "$root"/munge/munged.pid; do
  if [[ -s "$pid_file" ]] && kill -0 "$(< "$pid_file")" 2>/dev/null; then
    die "a Slurm of $root is running: bash slurm/local/down.sh $root stops it"
  fi
done

mkdir -p "$root"/{state,run,log,munge,etc,dev} "$root"/spool/n{1,2,3,4}
chmod 755 "$root" "$root/munge"
port="${XMCDIST_SLURM_PORT:-16817}"
for file in slurm.conf gres.conf; do
  sed -e "s|@ROOT@|$root|g" -e "s|@PORT0@|$port|" -e "s|@PORT1@|$((port + 4))|" -e "s|@PORT4@|$((port + 7))|" \
    "$here/$file.in" > "$root/etc/$file"
done
for i in 0 1 2 3; do # what stands for the GPUs of a node
  [[ -e "$root/dev/nvidia$i" ]] || mknod "$root/dev/nvidia$i" c 1 3
done
if [[ ! -s "$root/munge/munge.key" ]]; then
  (umask 077 && head -c 1024 /dev/urandom > "$root/munge/munge.key")
fi

export SLURM_CONF="$root/etc/slurm.conf"
# --force: a temporary folder is writable for all, which munged would refuse.
munged --force --key-file="$root/munge/munge.key" --socket="$root/munge/munge.socket.2" \
  --pid-file="$root/munge/munged.pid" --log-file="$root/munge/munged.log" --seed-file="$root/munge/munge.seed"
slurmctld -c -f "$SLURM_CONF" # -c: jobs of an earlier time are forgotten
for node in n1 n2 n3 n4; do slurmd -N "$node" -f "$SLURM_CONF"; done
for _ in $(seq 150); do
  if [[ "$(sinfo -h -p main -t idle -o %D 2>/dev/null)" == 4 ]]; then
    sinfo
    echo "Slurm is up. To use it here:  export SLURM_CONF=$SLURM_CONF"
    echo "To stop it:                   bash slurm/local/down.sh $root"
    exit 0
  fi
  sleep 0.2
done
die "the four nodes are not idle after 30 s; see $root/log"
