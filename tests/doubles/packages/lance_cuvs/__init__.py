"""A double of the package pylance-cuvs: the signatures of its published wheels, and the files that they write.

Held to the wheel by tests/test_doubles.py, and its files to Lance's own shuffler by the tests of the reader. It trains and encodes on
the CPU. Its artifacts are files with one list of rows for each partition, and the model, without a manifest.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import lance
import pyarrow as pa
from lance.file import LanceFileWriter

import lance_artifact as la

CALLS = []


class IvfPqTrainingOutput:
    def __init__(self, model):
        self._model = model
        self.num_partitions, self.num_sub_vectors, self.num_bits = (
            model.num_partitions,
            model.num_sub_vectors,
            model.num_bits,
        )
        self.metric_type = {"l2": "L2", "cosine": "Cosine"}[model.metric]

    def ivf_centroids(self):
        return self._model.ivf_centroids

    def pq_codebook(self):
        return self._model.pq_codebook


class IvfPqArtifactOutput:
    def __init__(self, artifact_uri, files):
        self.artifact_uri, self.files = artifact_uri, files


def train_ivf_pq(
    dataset_uri: str | os.PathLike[str],
    column: str,
    *,
    metric_type: str = "L2",
    num_partitions: int,
    num_sub_vectors: int,
    sample_rate: int = 256,
    max_iters: int = 50,
    num_bits: int = 8,
    filter_nan: bool = True,
) -> IvfPqTrainingOutput:
    given = dict(locals())
    CALLS.append(("train_ivf_pq", (given.pop("dataset_uri"), given.pop("column")), given))
    model = la.train(
        lance.dataset(dataset_uri), column, metric=metric_type.lower(), num_partitions=num_partitions,
        num_sub_vectors=num_sub_vectors, sample_rate=sample_rate, max_iters=max_iters, num_bits=num_bits, backend="cpu",
    )  # fmt: skip
    return IvfPqTrainingOutput(model)


def build_ivf_pq_artifact(
    dataset_uri: str | os.PathLike[str],
    column: str,
    *,
    training: IvfPqTrainingOutput,
    artifact_uri: str | os.PathLike[str] | None = None,
    batch_size: int = 1024 * 128,
    filter_nan: bool = True,
) -> IvfPqArtifactOutput:
    CALLS.append(
        ("build_ivf_pq_artifact", (dataset_uri, column), {"batch_size": batch_size, "filter_nan": filter_nan})
    )
    folder = Path(artifact_uri or tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as own:
        written = la.build_artifact(
            lance.dataset(dataset_uri), column, training._model, Path(own) / "a", backend="cpu"
        )
        # Sixteen batches of rows make a file, which is named by the first of them.
        partitions = [written.read_partition(p).read_all() for p in range(training.num_partitions)]
    rows = 16 * batch_size
    lengths = [len(partition) for partition in partitions]
    files = []
    for n in range(max(1, -(-max(lengths) // rows))):
        files.append(f"sorted_{16 * n}.lance")
        write_sorted(folder / files[-1], [partition.slice(n * rows, rows) for partition in partitions])
    write_metadata(folder / "metadata.lance", training)
    return IvfPqArtifactOutput(str(folder), [*files, "metadata.lance"])


def write_sorted(path, partitions):
    """A file of Lance's shuffler: of each partition that has rows one list of them, written by itself."""
    width = partitions[0].schema.field("__pq_code").type.list_size
    fields = [
        pa.field("_rowid", pa.uint64(), nullable=False),
        pa.field("__ivf_part_id", pa.uint32(), nullable=False),
        pa.field("__pq_code", pa.list_(pa.field("item", pa.uint8()), width)),
    ]
    schema = pa.schema([pa.field("partitions", pa.list_(pa.field("item", pa.struct(fields))))])
    with LanceFileWriter(str(path), schema, version="2.0") as writer:
        for n, rows in ((n, rows) for n, rows in enumerate(partitions) if len(rows)):
            part_ids = pa.array([n] * len(rows), pa.uint32())
            row_ids, codes = (rows.column(name).combine_chunks() for name in ("_rowid", "__pq_code"))
            columns = [row_ids, part_ids, codes.cast(fields[2].type)]
            items = pa.StructArray.from_arrays(columns, fields=fields)
            lists = pa.ListArray.from_arrays(
                pa.array([0, len(rows)], pa.int32()), items, type=schema.field(0).type
            )
            writer.write_batch(pa.record_batch([lists], schema=schema))


def write_metadata(path, training):
    columns = {"_ivf_centroids": training.ivf_centroids(), "_pq_codebook": training.pq_codebook()}
    width = training.ivf_centroids().type.list_size // training.num_sub_vectors
    columns["_pq_codebook"] = pa.FixedSizeListArray.from_arrays(columns["_pq_codebook"].flatten(), width)
    fields = [
        pa.field(name, pa.list_(pa.field(f"{name}_item", rows.type, nullable=False)), nullable=False)
        for name, rows in columns.items()
    ]
    with LanceFileWriter(str(path), pa.schema(fields), version="2.2") as writer:
        for name, value in (
            ("artifact_version", 1),
            ("distance_type", training.metric_type.lower()),
            ("num_partitions", training.num_partitions),
            ("num_sub_vectors", training.num_sub_vectors),
            ("num_bits", training.num_bits),
            ("dimension", training.ivf_centroids().type.list_size),
        ):
            writer.add_schema_metadata(f"lance:index_build:{name}", str(value))
        lists = [
            pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows, type=field.type)
            for field, rows in zip(fields, columns.values(), strict=True)
        ]
        writer.write_batch(pa.record_batch(lists, schema=pa.schema(fields)))
