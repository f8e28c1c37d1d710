#!/usr/bin/env bash
# Several machines by hand: start this on each of them, with its own MACHINE_RANK (the first has 0).
#
#   MACHINES=2 MACHINE_RANK=0 MAIN_IP=10.0.0.1 launch/hosts.sh configs/digits.yaml --run.dir /shared/runs
#
# Change: CONFIG_FILE (how to shard), PER_MACHINE (processes on each machine: its GPUs).
# RESTARTS=3 starts all processes again, up to three times, when one of them dies: they then meet by
# c10d. Only the run folder must be on a file system that all machines see. The machines need one
# another's ports; INTERFACE names their network where there are several. With the same secret in
# HPDIST_PREFLIGHT_TOKEN on each (openssl rand -hex 16 makes one), nobody else joins the preflight.
set -eu

HERE="$(cd "$(dirname "$0")/.." && pwd)"  # what stands beside launch/, wherever this is started
ACCELERATE="${ACCELERATE:-accelerate}"
HPDIST="${HPDIST:-hpdist}"
CONFIG_FILE="${CONFIG_FILE:-$HERE/configs/accelerate/zero2_bf16.yaml}"
MACHINES="${MACHINES:?how many machines there are}"
MACHINE_RANK="${MACHINE_RANK:?which of them this is, from 0}"
MAIN_IP="${MAIN_IP:?the address of machine 0, as the others reach it}"
MAIN_PORT="${MAIN_PORT:-29500}"
PER_MACHINE="${PER_MACHINE:-$(nvidia-smi --list-gpus 2> /dev/null | wc -l)}"
[ "$PER_MACHINE" -gt 0 ] || PER_MACHINE=1
RESTARTS="${RESTARTS:-0}"
if [ -n "${INTERFACE:-}" ]; then
  export GLOO_SOCKET_IFNAME="$INTERFACE" NCCL_SOCKET_IFNAME="$INTERFACE"
fi

# A clear word within a minute, in place of a launcher that waits for the machine that is not there.
"$HPDIST" preflight "$@" --processes "$MACHINES" --rank "$MACHINE_RANK" \
  --address "$MAIN_IP" --port "$((MAIN_PORT + 1))"

meeting=()
if [ "$RESTARTS" -gt 0 ]; then
  meeting=(--rdzv_backend c10d --max_restarts "$RESTARTS"
    --rdzv_conf "is_host=$((MACHINE_RANK == 0))")
fi
exec "$ACCELERATE" launch --config_file "$CONFIG_FILE" \
  --num_machines "$MACHINES" --machine_rank "$MACHINE_RANK" \
  --num_processes "$((MACHINES * PER_MACHINE))" \
  --main_process_ip "$MAIN_IP" --main_process_port "$MAIN_PORT" \
  --deepspeed_multinode_launcher standard ${meeting[@]+"${meeting[@]}"} \
  -m hpdist train "$@"
