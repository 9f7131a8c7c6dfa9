"""A build whose shards Daft encodes, on this machine or on its cluster.

python examples/daft_build.py DATASET COLUMN RUN SHARDS NUM_PARTITIONS NUM_SUB_VECTORS
"""

from __future__ import annotations

import sys

import daft

import lance_artifact as la


def main(arguments: list[str]) -> None:
    dataset, column, folder = arguments[:3]
    shards, num_partitions, num_sub_vectors = map(int, arguments[3:])
    plan = la.plan(
        dataset,
        column,
        num_partitions=num_partitions,
        num_sub_vectors=num_sub_vectors,
        num_shards=shards,
        calibrate=False,
        artifact_uri=folder,
    )
    # The one that is there already, where this was begun before.
    run = la.Run.create(plan, folder)
    run.train()

    @daft.udf(return_dtype=daft.DataType.int64())
    def encode(numbers: daft.Series) -> list[int]:
        return [run.encode(shard).num_rows for shard in numbers.to_pylist()]

    frame = daft.from_pydict({"shard": list(range(len(run.plan.shards)))}).into_partitions(
        len(run.plan.shards)
    )
    print(frame.with_column("rows", encode(daft.col("shard"))).to_pydict())
    run.finalize()
    print(run.status())


if __name__ == "__main__":
    main(sys.argv[1:])
