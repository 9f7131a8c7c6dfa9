"""Make the files beside this one, once for each version of the format: every later version must read them as they are.

    python tests/golden/make.py VERSION

Writes vectors.lance (if it is not there), artifact-vVERSION, indexed-vVERSION.lance (a copy with a committed index) and what is in
them as expected-vVERSION.json. What is there already is never written again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa

import lance_artifact as la

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

ROWS, DIMENSION, PARTITIONS, SUB_VECTORS = 600, 8, 8, 4


def table() -> pa.Table:
    from conftest import column, vectors

    return pa.table({"id": np.arange(ROWS), "vector": column(vectors(ROWS, DIMENSION, seed=42))})


def queries() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((5, DIMENSION)).astype(np.float32) * 3


def found(ds: Any) -> list[list[int]]:
    """What a search of the index finds for each query."""
    nearest = {"column": "vector", "k": 10, "nprobes": 4, "refine_factor": 2}
    return [
        ds.to_table(columns=["id", "_distance"], nearest={**nearest, "q": query})["id"].to_pylist()
        for query in queries()
    ]


def as_text(partitions: list[dict[int, bytes]]) -> list[dict[str, str]]:
    return [{str(row): code.hex() for row, code in sorted(rows.items())} for rows in partitions]


def main(version: int) -> None:
    from conftest import content, stored

    source, artifact, indexed = (
        HERE / "vectors.lance",
        HERE / f"artifact-v{version}",
        HERE / f"indexed-v{version}.lance",
    )
    if artifact.exists():
        sys.exit(f"{artifact} is there already, and stays as it is")
    if not source.exists():
        lance.write_dataset(table(), str(source), max_rows_per_file=ROWS // 2, data_storage_version="2.0")
    ds = lance.dataset(str(source))
    model = la.train(
        ds,
        "vector",
        num_partitions=PARTITIONS,
        num_sub_vectors=SUB_VECTORS,
        num_bits=4,
        sample_rate=16,
        backend="cpu",
    )
    # Not the path of the machine that this runs on.
    described = {**la.describe_source(ds, "vector"), "dataset_uri": source.name}
    with la.PartitionArtifactBuilder(
        artifact, model, source=described, num_buckets=3, format_version=version
    ) as builder:
        encoder = la.CpuEncoder(model)
        for batch in la.prepared_vectors(ds, "vector", metric=model.metric):
            part_ids, codes = encoder.encode(batch.column(1))
            for start in range(0, batch.num_rows, 100):
                columns = [column.slice(start, 100) for column in (batch.column(0), part_ids, codes)]
                builder.append_batch(pa.record_batch(columns, ["_rowid", "__ivf_part_id", "__pq_code"]))
    shutil.copytree(source, indexed)
    with_index = lance.dataset(str(indexed))
    la.finalize(with_index, "vector", builder.artifact)
    expected = {
        "partitions": as_text(content(builder.artifact)),
        "stored": as_text(stored(with_index, "vector_idx")),
        "found": found(with_index),
    }
    (HERE / f"expected-v{version}.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
