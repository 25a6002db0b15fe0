#!/usr/bin/env bash
# One machine with several GPUs: each works on a clip of its own, and takes the next when it is done.
#
#   scripts/multi_gpu.sh MANIFEST [options of run]
#
# GPUS chooses them (GPUS="0 1"). Ctrl-C stops all; the same command goes on.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: $0 MANIFEST [options of run]" >&2; exit 2; }
manifest=$1
shift
if [ -z "${GPUS:-}" ]; then
  GPUS=$(nvidia-smi --query-gpu=index --format=csv,noheader | tr '\n' ' ') || {
    echo 'no GPUs found: name them, as in GPUS="0 1"' >&2
    exit 2
  }
fi
export GPUS manifest
read -ra gpus <<<"$GPUS"

# A clip's name as a pattern, where [ * and ? must stand for themselves.
patterns='import glob, json, sys
jobs = json.load(sys.stdin)["jobs"]
print(*dict.fromkeys(glob.escape(job["clip"]) + "/*" for job in jobs), sep="\0", end="\0")'

jobs=$(tokenflow-batch run "$manifest" "$@" --dry-run --json)
# shellcheck disable=SC2016 # each process expands it
python3 -c "$patterns" <<<"$jobs" |
  xargs --null --max-procs="${#gpus[@]}" --process-slot-var=slot --replace bash -c '
    read -ra gpus <<<"$GPUS"
    CUDA_VISIBLE_DEVICES=${gpus[slot]} exec tokenflow-batch run "$manifest" --only "$@"
  ' run {} "$@"
