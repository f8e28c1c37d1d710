#!/usr/bin/env bash
# One machine, all its GPUs, or two CPU processes where there is none.
#
#   launch/local.sh configs/digits.yaml --algorithm.name freematch
#
# Change: CONFIG_FILE (how to shard), PROCESSES. RESTARTS=3 starts all of them again when one dies.
set -eu

HERE="$(cd "$(dirname "$0")/.." && pwd)"  # what stands beside launch/, wherever this is started
ACCELERATE="${ACCELERATE:-accelerate}"
GPUS="$(nvidia-smi --list-gpus 2> /dev/null | wc -l)"
if [ "$GPUS" -gt 0 ]; then
  CONFIG_FILE="${CONFIG_FILE:-$HERE/configs/accelerate/zero2_bf16.yaml}"
  PROCESSES="${PROCESSES:-$GPUS}"
else
  CONFIG_FILE="${CONFIG_FILE:-$HERE/configs/accelerate/cpu_bf16.yaml}"
  PROCESSES="${PROCESSES:-2}"
fi
exec "$ACCELERATE" launch --config_file "$CONFIG_FILE" --num_processes "$PROCESSES" \
  --max_restarts "${RESTARTS:-0}" -m hpdist train "$@"
