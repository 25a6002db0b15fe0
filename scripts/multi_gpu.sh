#!/usr/bin/env bash
# One machine with several GPUs: each works on a clip of its own, and takes the next when it is done.
#
#   scripts/multi_gpu.sh MANIFEST [options of run]
#
# GPUS chooses them (GPUS="0 1"). Ctrl-C stops all; the same command goes on.
set -euo pipefail
manifest=$1
shift
: "${GPUS:=$(nvidia-smi --query-gpu=index --format=csv,noheader | tr '\n' ' ')}"
export GPUS manifest
read -ra gpus <<<"$GPUS"

# A clip's name as a pattern, where [ * and ? must stand for themselves.
patterns='import glob, json, sys
jobs = json.load(sys.stdin)["jobs"]
print(*dict.fromkeys(glob.escape(job["clip"]) for job in jobs), sep="\0", end="\0")'

# shellcheck disable=SC2016 # each process expands it
tokenflow-batch status "$manifest" --json | python3 -c "$patterns" |
  xargs --null --max-procs="${#gpus[@]}" --process-slot-var=slot --replace bash -c '
    read -ra gpus <<<"$GPUS"
    CUDA_VISIBLE_DEVICES=${gpus[slot]} exec tokenflow-batch run "$manifest" --only "$@"
  ' run {} "$@"
