"""The finalizer: checks before side effects, datasets that moved on, failures that leave nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, differences, encoded, leftovers, segment, stored, vectors
from test_artifact import change_code

K, M, DIM, ROWS = 8, 4, 16, 3000


@pytest.fixture
def ds(write: Any) -> Any:
    return write(vectors(ROWS, DIM))


@pytest.fixture
def model(ds: Any) -> la.IvfPqModel:
    return la.train(
        ds, "vector", num_partitions=K, num_sub_vectors=M, sample_rate=4, max_iters=3, backend="cpu"
    )


@pytest.fixture
def artifact(ds: Any, model: la.IvfPqModel, tmp_path: Path) -> la.Artifact:
    return la.build_artifact(ds, "vector", model, tmp_path / "artifact", backend="cpu")


def names(ds: Any) -> list[str]:
    return sorted(i.name for i in lance.dataset(ds.uri).describe_indices())


def segments_on_disk(ds: Any) -> set[str]:
    root = Path(ds.uri) / "_indices"
    return {p.name for p in root.iterdir()} if root.exists() else set()


def test_the_handle_sees_the_index(ds: Any, artifact: la.Artifact) -> None:
    before = ds.version
    again = la.finalize(ds, "vector", artifact)
    assert again is ds and ds.version == before + 1
    assert [i.name for i in ds.describe_indices()] == ["vector_idx"]
    assert ds.stats.index_stats("vector_idx")["num_unindexed_rows"] == 0


def test_details_are_those_stock_writes(ds: Any, artifact: la.Artifact) -> None:
    la.finalize(ds, "vector", artifact, name="ours")
    ds.create_index("vector", "IVF_PQ", name="stock", num_partitions=K, num_sub_vectors=M)
    by_name = {i.name: i for i in ds.describe_indices()}
    ours, stock = by_name["ours"], by_name["stock"]
    assert ours.type_url == stock.type_url and ours.index_type == stock.index_type == "IVF_PQ"
    assert segment(ds, "ours").index_version == segment(ds, "stock").index_version
    for key in ("metric_type", "compression"):
        assert ours.details.get(key) == stock.details.get(key), (ours.details, stock.details)


def test_replace(ds: Any, artifact: la.Artifact) -> None:
    la.finalize(ds, "vector", artifact)
    first = segment(ds, "vector_idx").uuid
    with pytest.raises(la.IndexExistsError, match="replace=True"):
        la.finalize(ds, "vector", artifact)
    with pytest.raises(RuntimeError):
        la.create_index(ds, "vector", num_partitions=K, num_sub_vectors=M, backend="cpu")
    la.finalize(ds, "vector", artifact, replace=True)
    assert segment(ds, "vector_idx").uuid != first


def test_a_foreign_artifact_without_source_or_model(
    ds: Any, model: la.IvfPqModel, artifact: la.Artifact, tmp_path: Path
) -> None:
    with la.PartitionArtifactBuilder(str(tmp_path / "b"), num_partitions=K, pq_code_width=M) as builder:
        for partition in range(K):
            table = artifact.read_partition(partition).read_all()
            ids = pa.array(np.full(table.num_rows, partition, np.uint32))
            builder.append_batch(
                pa.table([table[0], ids, table[1]], ["_rowid", "__ivf_part_id", "__pq_code"])
            )
    with pytest.raises(la.ArtifactMismatchError, match="pass model="):
        la.finalize(ds, "vector", builder.artifact)
    with pytest.raises(la.ArtifactMismatchError, match="pass fragment_ids="):
        la.finalize(ds, "vector", builder.artifact, model=model)
    la.finalize(ds, "vector", builder.artifact, model=model, fragment_ids=[0, 1, 2], name="foreign")
    la.finalize(ds, "vector", artifact, name="ours")
    assert differences(stored(ds, "foreign"), stored(ds, "ours")) == (K, 0, 0)


def other_model(model: la.IvfPqModel, **change: Any) -> la.IvfPqModel:
    centroids = np.array(model.ivf_centroids.flatten()).reshape(K, DIM)
    codebook = np.array(model.pq_codebook.flatten()).reshape(M, 256, DIM // M)
    dtype = change.get("dtype", "float32")
    return la.IvfPqModel(
        (centroids * change.get("scale", 1)).astype(dtype), codebook.astype(dtype), change.get("metric", "l2")
    )


def raw(path: Path, model: Any, rows: pa.Table, **options: Any) -> la.Artifact:
    with la.PartitionArtifactBuilder(str(path), model, **options) as builder:
        builder.append_batch(rows)
    return builder.artifact


def test_what_does_not_fit_is_refused_before_anything_is_written(
    ds: Any, model: la.IvfPqModel, artifact: la.Artifact, tmp_path: Path, write: Any
) -> None:
    rows, half, everything = encoded(100, K, M), encoded(ROWS // 2, K, M), {"fragment_ids": [0, 1, 2]}
    wide = write(vectors(ROWS, 2 * DIM), name="wide.lance")
    more = write(np.concatenate([vectors(ROWS, DIM), vectors(ROWS, DIM)]), name="more.lance")
    newer = la.describe_source(ds, "vector")
    newer["version"] += 5
    cases: list[tuple[str, Any, Any, dict[str, Any], type[Exception], str]] = [
        ("dtype", ds, raw(tmp_path / "c1", other_model(model, dtype="float64"), rows), {}, la.ArtifactMismatchError, "float64"),
        ("dimension", wide, artifact, {}, la.ArtifactMismatchError, "dimension"),
        ("metric", ds, artifact, {"metric": "dot"}, la.ArtifactMismatchError, "metric"),
        ("model", ds, artifact, {"model": other_model(model, scale=2)}, la.ArtifactMismatchError, "fingerprint"),
        ("two models", ds, [artifact, raw(tmp_path / "c2", other_model(model, scale=2), rows)], {}, la.ArtifactMismatchError, "one model"),
        ("fragments", ds, artifact, {"fragment_ids": [0]}, la.ArtifactMismatchError, "exactly those"),
        ("twice", ds, [artifact, artifact], {}, la.InvalidInputError, "twice"),
        ("no fragments said", ds, raw(tmp_path / "c0", model, rows), {}, la.ArtifactMismatchError, "pass fragment_ids="),
        ("too few rows", ds, raw(tmp_path / "c9", model, rows), everything, la.ArtifactMismatchError, "account for 100 rows"),
        ("strange rows", ds, raw(tmp_path / "c3", model, encoded(ROWS, K, M, first=9 << 32)), everything, la.ArtifactMismatchError, "not a row"),
        ("rows past the end", ds, raw(tmp_path / "c4", model, encoded(ROWS, K, M)), everything, la.ArtifactMismatchError, "not a row"),
        ("duplicate rows", ds, [raw(tmp_path / "c5", model, half.slice(0, 1000)), raw(tmp_path / "c6", model, pa.concat_tables([half.slice(0, 1000)] * 2))], everything, la.CorruptArtifactError, "twice"),
        ("other dataset", more, artifact, {}, la.ArtifactMismatchError, "another dataset"),
        ("version", ds, raw(tmp_path / "c7", model, rows, source=newer), {}, la.InvalidInputError, "version"),
        ("none", ds, [], {}, la.InvalidInputError, "none"),
        ("nowhere", ds, tmp_path / "nowhere", {}, la.ArtifactNotFoundError, "no partition artifact"),
        ("column", ds, artifact, {"column": "id"}, la.ColumnTypeError, "Vector column"),
        ("no column", ds, artifact, {"column": "nope"}, la.ColumnNotFoundError, "not found"),
        ("index type", ds, artifact, {"index_type": "IVF_SQ"}, la.InvalidInputError, "index_type"),
    ]  # fmt: skip
    for name, dataset, artifacts, options, error, message in cases:
        options = dict(options)
        with pytest.raises(error, match=message) as caught:
            la.finalize(dataset, options.pop("column", "vector"), artifacts, **options)
        assert isinstance(caught.value, la.LanceArtifactError), name
        assert segments_on_disk(dataset) == set(), name
        assert names(dataset) == [], name


def test_a_damaged_artifact_leaves_the_old_index(ds: Any, artifact: la.Artifact, tmp_path: Path) -> None:
    la.finalize(ds, "vector", artifact)
    before, uuid = segments_on_disk(ds), segment(ds, "vector_idx").uuid
    change_code(tmp_path / "artifact", 0)
    with pytest.raises(la.CorruptArtifactError):
        la.finalize(ds, "vector", str(tmp_path / "artifact"), replace=True)
    assert segments_on_disk(ds) == before
    assert segment(lance.dataset(ds.uri), "vector_idx").uuid == uuid


def found(ds: Any, query: np.ndarray) -> list[int]:
    return ds.to_table(nearest={"column": "vector", "q": query, "k": 5, "nprobes": K, "refine_factor": 20})[
        "id"
    ].to_pylist()


def test_append_delete_and_update_meanwhile(ds: Any, artifact: la.Artifact) -> None:
    array = vectors(ROWS, DIM)
    extra = vectors(20, DIM, seed=3) + 100
    other = lance.dataset(ds.uri)
    lance.write_dataset(
        pa.table({"id": pa.array(range(ROWS, ROWS + 20)), "vector": column(extra)}), ds.uri, mode="append"
    )
    other.checkout_latest()
    other.delete("id = 7")
    other.update({"id": "5555"}, where="id = 9")
    ds = la.finalize(ds, "vector", artifact)
    ds.checkout_latest()
    assert segment(ds, "vector_idx").uuid
    assert 7 not in found(ds, array[7])
    assert found(ds, array[9])[0] == 5555
    assert found(ds, extra[4])[0] == ROWS + 4
    assert found(ds, array[100])[0] == 100


def test_a_newer_handle_builds_at_the_rows_version(ds: Any, artifact: la.Artifact) -> None:
    lance.dataset(ds.uri).delete("id = 7")
    newer = lance.dataset(ds.uri)
    assert newer.version > artifact.manifest["source"]["version"]
    la.finalize(newer, "vector", artifact)
    assert [i.name for i in newer.describe_indices()] == ["vector_idx"]
    assert 7 not in found(newer, vectors(ROWS, DIM)[7])


@pytest.mark.parametrize("what", ["compaction", "overwrite"])
def test_a_rewritten_dataset_is_a_conflict(what: str, ds: Any, artifact: la.Artifact) -> None:
    other = lance.dataset(ds.uri)
    if what == "compaction":
        other.optimize.compact_files(target_rows_per_fragment=10 * ROWS)
    else:
        lance.write_dataset(
            pa.table({"id": [1], "vector": column(vectors(1, DIM))}), ds.uri, mode="overwrite"
        )
    with pytest.raises(la.CommitConflictError, match="build again"):
        la.finalize(ds, "vector", artifact)
    assert names(ds) == []
    assert segments_on_disk(ds) == set()


def test_cleaned_up_version(ds: Any, artifact: la.Artifact) -> None:
    import datetime

    ds.delete("id = 1")
    ds.delete("id = 2")
    latest = lance.dataset(ds.uri)
    latest.cleanup_old_versions(datetime.timedelta(0))
    with pytest.raises(la.InvalidInputError, match="cleaned up"):
        la.finalize(latest, "vector", artifact)


def test_another_build_of_the_same_index_meanwhile(ds: Any, artifact: la.Artifact) -> None:
    lance.dataset(ds.uri).create_index(
        "vector", "IVF_PQ", name="vector_idx", num_partitions=K, num_sub_vectors=M
    )
    theirs = segment(lance.dataset(ds.uri), "vector_idx").uuid
    with pytest.raises(la.IndexExistsError):
        la.finalize(ds, "vector", artifact)
    assert segments_on_disk(ds) == {theirs}
    la.finalize(ds, "vector", artifact, replace=True)
    assert segment(ds, "vector_idx").uuid != theirs


def test_rows_dropped_in_silence_are_found(
    ds: Any, model: la.IvfPqModel, artifact: la.Artifact, tmp_path: Path
) -> None:
    rows = [
        artifact.read_partition(p).read_all().append_column("part_id", pa.array([p] * n, pa.uint32()))
        for p, n in enumerate(artifact.partition_sizes())
    ]
    rows[3] = rows[3].slice(5)
    made = la.PartitionArtifactBuilder(str(tmp_path / "b"), model, source=la.describe_source(ds, "vector"))
    for table in rows:
        made.append_batch(table)
    with pytest.raises(la.ArtifactMismatchError, match="must be counted"):
        la.finalize(ds, "vector", made.finish())


def test_killed_while_finalizing(ds: Any, artifact: la.Artifact) -> None:
    """Killed at many instants: the dataset opens, no new index is visible, and a rerun succeeds."""
    script = """
import sys, threading, os, time
import lance, lance_artifact as la
ds = lance.dataset(sys.argv[1]); a = la.Artifact.open(sys.argv[2])
def kill():
    time.sleep(float(sys.argv[3])); os._exit(9)
threading.Thread(target=kill, daemon=True).start()
import lance_artifact._finalize as module
module.commit_segment = lambda *a: time.sleep(60)
la.finalize(ds, "vector", a)
"""
    for delay in ("0.0", "0.01", "0.05", "0.3"):
        code = subprocess.run(
            [sys.executable, "-c", script, ds.uri, artifact.uri, delay], check=False
        ).returncode
        assert code == 9
        assert names(ds) == []
        assert lance.dataset(ds.uri).count_rows() == ROWS
    la.finalize(ds, "vector", artifact)
    assert names(ds) == ["vector_idx"]


def test_interrupt_leaves_nothing(ds: Any, tmp_path: Path) -> None:
    """Ctrl-C at any moment of a build is answered at once and cleans up."""
    script = """
import os, signal, sys, tempfile, threading, time
tempfile.tempdir = sys.argv[2]
import lance, lance_artifact as la
ds = lance.dataset(sys.argv[1])
hit = None
def interrupt():
    global hit
    time.sleep(float(sys.argv[3])); hit = time.monotonic(); os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
try:
    while True:
        la.create_index(ds, "vector", num_partitions=8, num_sub_vectors=4, sample_rate=64, backend="cpu", replace=True)
except KeyboardInterrupt:
    assert time.monotonic() - hit < 1, time.monotonic() - hit
    sys.exit(42)
"""
    (tmp_path / "temporary").mkdir()
    for delay in ("0.05", "0.2", "0.7"):
        run = subprocess.run(
            [sys.executable, "-c", script, ds.uri, str(tmp_path / "temporary"), delay],
            check=False,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 42, run.stderr
        assert leftovers(tmp_path / "temporary") == []
        latest = lance.dataset(ds.uri)
        live = {s.uuid for i in latest.describe_indices() for s in i.segments}
        old = {
            s.uuid
            for v in latest.versions()
            for i in latest.checkout_version(v["version"]).describe_indices()
            for s in i.segments
        }
        assert segments_on_disk(ds) <= live | old


def test_an_exit_at_the_end_leaves_nothing(ds: Any, artifact: la.Artifact) -> None:
    """The segment is complete by then, and not yet committed."""

    def progress(step: Any) -> None:
        if step.event == "complete":
            sys.exit(3)

    with pytest.raises(SystemExit):
        la.finalize(ds, "vector", artifact, progress=progress)
    assert names(ds) == [] and segments_on_disk(ds) == set()
    la.finalize(ds, "vector", artifact)


def test_an_empty_partition_and_an_empty_artifact(write: Any, model: la.IvfPqModel, tmp_path: Path) -> None:
    few = write(vectors(10, DIM), name="few.lance", max_rows_per_file=10)
    la.finalize(few, "vector", raw(tmp_path / "one", model, encoded(10, 1, M)), fragment_ids=[0])
    assert [len(p) for p in stored(few, "vector_idx")] == [10] + [0] * (K - 1)
    empty = write(
        pa.array([None] * 10, pa.list_(pa.float32(), DIM)), name="empty.lance", max_rows_per_file=10
    )
    nothing = write_nothing(tmp_path / "none", model)
    with pytest.raises(la.ArtifactMismatchError, match="account for 0 rows"):
        la.finalize(empty, "vector", nothing, fragment_ids=[0])
    la.finalize(empty, "vector", la.build_artifact(empty, "vector", model, tmp_path / "nulls", backend="cpu"))
    assert sum(map(len, stored(empty, "vector_idx"))) == 0


def write_nothing(path: Path, model: la.IvfPqModel) -> la.Artifact:
    with la.PartitionArtifactBuilder(str(path), model) as builder:
        pass
    return builder.artifact


def test_many_artifacts_with_few_open_files(ds: Any, model: la.IvfPqModel, tmp_path: Path) -> None:
    """An index of a cluster's artifacts reads thousands of files; a process may often open only a thousand at once."""
    centroids = ds.to_table(columns=["vector"], limit=64)["vector"].combine_chunks()
    many = la.IvfPqModel(centroids, model.pq_codebook, num_sub_vectors=M)
    shards = [
        la.build_artifact(
            ds, "vector", many, tmp_path / f"shard{fragment.fragment_id}", backend="cpu", num_buckets=64,
            fragment_ids=[fragment.fragment_id],
        )
        for fragment in ds.get_fragments()
    ]  # fmt: skip
    files = sum(len(list(Path(tmp_path, f"shard{n}", "partitions").iterdir())) for n in range(len(shards)))
    assert files > 160
    script = (
        "import resource, sys, lance, lance_artifact as la;"
        "ds = lance.dataset(sys.argv[1]); resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100));"
        "la.finalize(ds, 'vector', sys.argv[2:])"
    )
    subprocess.run([sys.executable, "-c", script, ds.uri, *(a.uri for a in shards)], check=True, timeout=120)
    assert lance.dataset(ds.uri).stats.index_stats("vector_idx")["num_indexed_rows"] == ROWS
