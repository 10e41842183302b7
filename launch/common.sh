#!/usr/bin/env bash
# Sourced by the other launch scripts: where the checkout is, and an environment to run it in.
#
#   XMCDIST_PYTHON       interpreter to make the environment from (default: the first >= 3.11 found)
#   XMCDIST_VENV         the environment's folder (default: .venv in the checkout)
#   XMCDIST_CONSTRAINTS  pinned versions (default: constraints.txt; /dev/null takes the newest)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${XMCDIST_VENV:-$root/.venv}"
constraints="${XMCDIST_CONSTRAINTS:-$root/constraints.txt}"

die() { echo "$(basename "$0"): error: $*" >&2; exit 1; }

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in ${XMCDIST_PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if recent "$candidate"; then echo "$candidate"; return; fi
  done
  die "no Python >= 3.11 among ${XMCDIST_PYTHON:-python3, python3.13, python3.12, python3.11, python}; set XMCDIST_PYTHON"
}

# What decides about an environment's content, as one word.
recipe() { { cat "$root/pyproject.toml" "$constraints"; echo "$root $1"; } | cksum | tr -d ' '; }

# use_venv EXTRA...: make or refresh the environment with the first extra, unless it has one of them already.
use_venv() {
  local extra base start
  [[ -e "$constraints" ]] || die "XMCDIST_CONSTRAINTS=$constraints does not exist"
  if recent "$venv/bin/python"; then
    for extra in "$@"; do
      [[ "$(cat "$venv/.xmcdist-$extra" 2>/dev/null)" == "$(recipe "$extra")" ]] && return
    done
  else
    if [[ -e "$venv" && ! -e "$venv/pyvenv.cfg" ]]; then
      die "$venv exists and is no Python environment; set XMCDIST_VENV to another folder"
    fi
    base="$(find_python)"
    if ! "$base" -m venv --clear "$venv"; then
      rm -rf "$venv" # half an environment would be taken for one next time
      die "$base cannot make environments; on Debian: apt-get install python3-venv"
    fi
  fi
  start=$SECONDS
  echo "installing xmcdist[$1] into $venv: some minutes, once"
  # -qq: errors only; on some machines pip warns about its index in dozens of lines.
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check -c "$constraints" -e "${root}[$1]" \
    || die "the installation failed; if the index cannot be reached, set PIP_INDEX_URL"
  recipe "$1" > "$venv/.xmcdist-$1"
  echo "installed in $((SECONDS - start)) s"
}

cores() { nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1; }

at_least_one() { echo $(($1 > 1 ? $1 : 1)); }
