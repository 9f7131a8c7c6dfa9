#!/usr/bin/env bash
# A build in steps, one process for each shard, as a queue or an array job would run them.
#
#     examples/shell_loop.sh DATASET COLUMN RUN SHARDS [arguments of lance-artifact plan]
set -euo pipefail
dataset=$1 column=$2 run=$3 shards=$4
shift 4
lance-artifact plan "$dataset" "$column" --num-shards "$shards" --run "$run" "$@"
lance-artifact run train "$run"
for ((shard = 0; shard < shards; shard++)); do
    # May be repeated, and run at the same time: whoever publishes first is taken.
    lance-artifact run encode "$run" --shard "$shard"
done
lance-artifact run finalize "$run"
