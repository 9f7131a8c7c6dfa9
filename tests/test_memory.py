"""`memory_limit` of whole calls: what does not fit is refused with what would, and what fits gives the same index."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, encoded, stored, vectors
from test_process import python


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


@pytest.fixture
def model() -> la.IvfPqModel:
    rng = np.random.default_rng(0)
    return la.IvfPqModel(
        rng.standard_normal((4, 8)).astype("f4"), rng.standard_normal((8, 256, 1)).astype("f4")
    )


def shards(ds: Any, model: la.IvfPqModel, folder: Path) -> list[la.Artifact]:
    made = []
    for fragment in ds.get_fragments():
        number, rows = fragment.fragment_id, fragment.count_rows()
        source = la.describe_source(ds, "vector", fragment_ids=[number])
        with la.PartitionArtifactBuilder(folder / str(number), model, source=source) as builder:
            builder.append_batch(encoded(rows, 4, 8, seed=number, first=number << 32))
        made.append(builder.artifact)
    return made


def test_what_does_not_fit_is_refused_with_what_would(
    write: Callable[..., Any], model: la.IvfPqModel, tmp_path: Path
) -> None:
    ds = write(vectors(3000, 8))
    made = shards(ds, model, tmp_path / "shards")
    with pytest.raises(
        la.InvalidInputError, match="memory_limit: got 1048576 bytes, expected at least"
    ) as error:
        la.finalize(ds, "vector", made, memory_limit=1 << 20)
    assert not ds.describe_indices() and not (tmp_path / "vectors.lance" / "_indices").exists()
    la.finalize(ds, "vector", made, memory_limit=numbers(str(error.value))[1])
    assert sum(map(len, stored(ds, "vector_idx"))) == 3000


def test_a_precomputed_artifact_takes_the_limit_too(
    write: Callable[..., Any], model: la.IvfPqModel, tmp_path: Path
) -> None:
    ds = write(vectors(3000, 8), max_rows_per_file=3000)
    with la.PartitionArtifactBuilder(
        tmp_path / "a", model, source=la.describe_source(ds, "vector")
    ) as builder:
        builder.append_batch(encoded(3000, 4, 8))
    options = {"precomputed_partition_artifact_uri": str(tmp_path / "a"), "name": "made"}
    with pytest.raises(la.InvalidInputError, match="memory_limit: got 1 bytes, expected at least") as error:
        ds.create_index("vector", "IVF_PQ", memory_limit=1, **options)
    assert not ds.describe_indices()
    ds.create_index("vector", "IVF_PQ", memory_limit=numbers(str(error.value))[1], **options)
    assert sum(map(len, stored(ds, "made"))) == 3000


def test_a_partition_of_several_artifacts_slice_by_slice(model: la.IvfPqModel, tmp_path: Path) -> None:
    """Three artifacts, whose partitions are cut at other places than the artifacts are."""
    values = np.zeros((900_000, 8), np.float32)
    table = pa.table({"vector": column(values)})
    ds = lance.write_dataset(table, str(tmp_path / "t.lance"), max_rows_per_file=300_007)
    made = shards(ds, model, tmp_path / "shards")
    la.finalize(ds, "vector", made, name="whole")
    la.finalize(ds, "vector", made, name="sliced", memory_limit=14 << 20)
    assert stored(ds, "whole") == stored(ds, "sliced")


def test_a_limit_that_lances_own_builder_would_not_keep_is_refused(
    write: Callable[..., Any], model: la.IvfPqModel, tmp_path: Path
) -> None:
    ds = write(vectors(3000, 8))
    made = shards(ds, model, tmp_path / "shards")
    graphs = {"index_type": "IVF_HNSW_PQ", "m": 8, "ef_construction": 20}
    with pytest.raises(la.InvalidInputError, match=r"expected at least .*Lance's builder") as error:
        la.finalize(ds, "vector", made, memory_limit=256 << 20, **graphs)
    assert not ds.describe_indices()
    la.finalize(ds, "vector", made, memory_limit=numbers(str(error.value))[1], **graphs)
    assert ds.describe_indices()[0].index_type == "IVF_HNSW_PQ"


# What calls take, in processes of their own

PEAK = """
import sys
import lance, lance_artifact as la
folder, limit = sys.argv[1], int(sys.argv[2])
ds = lance.dataset(folder + "/t.lance")
ds.count_rows()

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))

before = peak()
{work}
print((peak() - before) // 1024)
"""

# Code that is paged in, threads, what Lance keeps of a dataset: see docs/ARCHITECTURE.md.
MARGIN = 64


def peak(work: str, folder: Path, limit: int) -> int:
    """MiB above what the process took before, at the most."""
    if sys.platform != "linux":
        pytest.skip("Linux tells what a process took at the most")
    done = python(PEAK.format(work=work), str(folder), str(limit))
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 MB of vectors."""
    folder = tmp_path_factory.mktemp("wide")
    values = np.random.default_rng(0).standard_normal((130_000, 384), dtype=np.float32)
    lance.write_dataset(
        pa.table({"vector": column(values)}), str(folder / "t.lance"), max_rows_per_file=40_000
    )
    return folder


BUILD = (
    'la.create_index(ds, "vector", num_partitions=64, num_sub_vectors=16, replace=True, backend="cpu", {})\n'
)


def test_a_build_keeps_within_its_limit(wide: Path) -> None:
    limit = 96 << 20
    assert peak(BUILD.format("memory_limit=limit, max_iters=4"), wide, limit) < (limit >> 20) + MARGIN
    assert lance.dataset(str(wide / "t.lance")).stats.index_stats("vector_idx")["num_indexed_rows"] == 130_000


def test_training_takes_what_the_limit_allows(wide: Path, caplog: pytest.LogCaptureFixture) -> None:
    ds = lance.dataset(str(wide / "t.lance"))
    options = {"num_partitions": 512, "num_sub_vectors": 16, "max_iters": 2, "backend": "cpu"}
    model = la.train(ds, "vector", memory_limit=64 << 20, **options)
    assert (
        "moving them to the means of 130000, which come in parts: more do not fit memory_limit" in caplog.text
    )
    trained_on = numbers(caplog.text.split("training centroids on ")[1])[0]
    assert 10_000 < trained_on < 60_000
    assert model.num_partitions == 512 and model.training["max_iters"] == 2
    again = la.train(ds, "vector", memory_limit=64 << 20, **options)
    assert model.ivf_centroids.equals(again.ivf_centroids) and model.pq_codebook.equals(again.pq_codebook)
    with pytest.raises(la.InvalidInputError, match=r"a sample of \d+ vectors.*does not fit memory_limit"):
        la.train(ds, "vector", memory_limit=4 << 20, **{**options, "num_partitions": 4096})


def test_the_call_that_trains_in_parts_keeps_within_its_limit(wide: Path) -> None:
    work = 'la.train(ds, "vector", num_partitions=512, num_sub_vectors=16, backend="cpu", memory_limit=limit)'
    assert peak(work, wide, 64 << 20) < 64 + MARGIN


def test_a_limit_that_is_too_small_is_refused_before_training(wide: Path) -> None:
    """With one that is larger; what each part of the call needs is known before the first begins."""
    ds = lance.dataset(str(wide / "t.lance"))
    options = {"num_partitions": 64, "num_sub_vectors": 16, "backend": "cpu", "name": "small"}
    seen: list[Any] = []
    limit, tries = 3_000_000, 0
    while limit < 40 << 20 and not seen:
        try:
            la.create_index(ds, "vector", memory_limit=limit, progress=seen.append, **options)
        except la.InvalidInputError as error:
            assert f"memory_limit: got {limit} bytes, expected at least" in str(error) and not seen
            limit, tries = numbers(str(error))[1], tries + 1
    assert seen and 1 <= tries <= 3
    assert ds.stats.index_stats("small")["num_indexed_rows"] == 130_000


def test_a_large_partition_is_finalized_within_the_limit(tmp_path: Path, model: la.IvfPqModel) -> None:
    """One partition of 160 MB of row ids and codes at 48 MiB."""
    rows = 10_000_000
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(rows * 8, np.float32)), 8)
    ds = lance.write_dataset(pa.table({"vector": values}), str(tmp_path / "t.lance"), max_rows_per_file=rows)
    with la.PartitionArtifactBuilder(
        tmp_path / "a", model, source=la.describe_source(ds, "vector"), sync=False
    ) as builder:
        for first in range(0, rows, 1_000_000):
            builder.append_batch(encoded(1_000_000, 1, 8, first=first))
    limit = 48 << 20
    work = 'la.finalize(ds, "vector", folder + "/a", memory_limit=limit)'
    assert peak(work, tmp_path, limit) < (limit >> 20) + MARGIN
    assert lance.dataset(ds.uri).stats.index_stats("vector_idx")["num_indexed_rows"] == rows


def test_artifacts_of_one_model_share_it(tmp_path: Path) -> None:
    """Forty empty artifacts of a model of 12 MB."""
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((4096, 768)).astype("f4")
    model = la.IvfPqModel(centroids, rng.standard_normal((256, 768)).astype("f4"), num_sub_vectors=96)
    lance.write_dataset(pa.table({"vector": column(centroids[:1])}), str(tmp_path / "t.lance"))
    for n in range(40):
        with la.PartitionArtifactBuilder(tmp_path / f"a{n}", model, sync=False):
            pass
    work = 'opened = la.Artifact._open_all([(f"{folder}/a{n}", None) for n in range(40)])'
    assert peak(work, tmp_path, 0) < 4 * 12 + MARGIN


WRITE = """
import numpy as np, pyarrow as pa
codes = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(250_000 * 64, np.uint8)), 64)
parts = pa.array(np.arange(250_000, dtype=np.uint32) % 64)
ids = pa.array(np.arange(250_000, dtype=np.uint64))
batch = pa.record_batch([ids, parts, codes], ["_rowid", "__ivf_part_id", "__pq_code"])
options = dict(num_partitions=64, pq_code_width=64, memory_limit=limit, sync=False)
with la.PartitionArtifactBuilder(folder + "/long", **options) as builder:
    for _ in range(64):
        builder.append_batch(batch)
"""


def test_a_long_build_keeps_within_its_limit(wide: Path) -> None:
    """Its stages grow; those that were outgrown are given back."""
    limit = 256 << 20
    assert peak(WRITE, wide, limit) < (limit >> 20) + MARGIN


MANY_PAGES = """
import numpy as np, pyarrow as pa
step, buckets = 1 << 20, 64
part_ids = pa.array(np.arange(step, dtype="u4") % buckets)
codes = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(step, "u1")), 1)
options = dict(num_partitions=buckets, num_buckets=buckets, pq_code_width=1, memory_limit=limit, sync=False)
with la.PartitionArtifactBuilder(folder + "/pages", **options) as builder:
    for n in range(100):
        ids = pa.array(np.arange(n * step, (n + 1) * step, dtype="u8"))
        builder.append_batch(pa.record_batch([ids, part_ids, codes], ["row_id", "part_id", "pq_code"]))
    before = peak()
"""


def test_closing_files_of_many_pages_takes_little_memory(tmp_path: Path) -> None:
    """Of 1,400 small stages in 64 files."""
    lance.write_dataset(pa.table({"id": [1]}), str(tmp_path / "t.lance"))
    assert peak(MANY_PAGES, tmp_path, 8 << 20) < 24
