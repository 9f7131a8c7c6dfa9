"""What an index covers: the rows of the artifacts are the live rows of the fragments committed, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, differences, encoded, leftovers, segment, stored, vectors

K, M, DIM, ROWS = 6, 4, 16, 2000


def names(ds: Any) -> list[str]:
    return [i.name for i in lance.dataset(ds.uri).describe_indices()]


def trained(ds: Any, **options: Any) -> la.IvfPqModel:
    return la.train(
        ds, "vector", **{"num_partitions": K, "num_sub_vectors": M, "sample_rate": 6, "max_iters": 3, "backend": "cpu", **options}
    )  # fmt: skip


def by_hand(
    ds: Any,
    model: la.IvfPqModel,
    path: Path,
    *,
    keep: Any = None,
    count: bool = False,
    fragment_ids: list[int] | None = None,
    **options: Any,
) -> la.Artifact:
    """An artifact through the builder, of the rows that ``keep`` leaves, with no source unless given."""
    scan = la.prepared_vectors(ds, "vector", metric=model.metric, fragment_ids=fragment_ids)
    encoder = la.CpuEncoder(model)
    made = la.PartitionArtifactBuilder(str(path), model, **options)
    for batch in scan:
        if keep is not None:
            batch = batch.filter(pa.array(keep(batch["_rowid"].to_numpy())))
        part_id, pq_code = encoder.encode(batch["vector"])
        made.append_batch(
            pa.record_batch([batch["_rowid"], part_id, pq_code], ["_rowid", "__ivf_part_id", "__pq_code"])
        )
    return made.finish(rows_dropped=scan.dropped) if count else made.finish()


def without_counts(path: Path) -> str:
    """As other writers leave it: a manifest of the required keys only."""
    manifest = json.loads((path / "manifest.json").read_text())
    kept = {key: manifest[key] for key in ("version", "num_partitions", "partitions")}
    (path / "manifest.json").write_text(json.dumps(kept))
    return str(path)


@pytest.fixture(params=[False, True], ids=["addresses", "stable"])
def ds(request: pytest.FixtureRequest, write: Any) -> Any:
    return write(vectors(ROWS, DIM), enable_stable_row_ids=request.param)


def append(ds: Any, rows: int = ROWS, seed: int = 7) -> Any:
    more = pa.table(
        {"id": pa.array(range(ROWS, ROWS + rows)), "vector": column(vectors(rows, DIM, seed=seed))}
    )
    return lance.write_dataset(more, ds.uri, mode="append")


def refused(ds: Any, artifacts: Any, message: str, **options: Any) -> None:
    before = leftovers(Path(ds.uri))
    with pytest.raises(la.ArtifactMismatchError, match=message):
        la.finalize(ds, "vector", artifacts, **options)
    assert leftovers(Path(ds.uri)) == before and names(ds) == []


def test_an_artifact_without_source_needs_the_callers_word(ds: Any, tmp_path: Path) -> None:
    """Encoded, then appended: the fragments that came since are not covered, and nobody has to guess it."""
    model = trained(ds)
    before = [f.fragment_id for f in ds.get_fragments()]
    artifact = by_hand(ds, model, tmp_path / "a")
    grown = append(ds)
    everything = [f.fragment_id for f in grown.get_fragments()]
    assert len(everything) > len(before)
    refused(grown, artifact, "pass fragment_ids=")
    refused(grown, artifact, "account for", fragment_ids=everything)
    la.finalize(grown, "vector", artifact, fragment_ids=before)
    assert set(segment(grown, "vector_idx").fragment_ids) == set(before)
    query = vectors(ROWS, DIM, seed=7)[5]
    found = grown.to_table(
        nearest={"column": "vector", "q": query, "k": 1, "nprobes": K, "refine_factor": 20}
    )
    assert found["id"].to_pylist() == [ROWS + 5]


def test_a_manifest_of_the_required_keys_only(ds: Any, tmp_path: Path) -> None:
    model = trained(ds)
    ids = [f.fragment_id for f in ds.get_fragments()]
    by_hand(ds, model, tmp_path / "a")
    uri = without_counts(tmp_path / "a")
    refused(ds, uri, "pass fragment_ids=")
    grown = append(ds, 100)
    # Without counts the vectors of the rows that are missing are looked at.
    refused(
        grown, uri, r"100 rows .* have a vector", fragment_ids=[f.fragment_id for f in grown.get_fragments()]
    )
    la.finalize(ds, "vector", uri, fragment_ids=ids)
    assert sum(map(len, stored(ds, "vector_idx"))) == ROWS


def test_missing_rows_that_no_index_holds_are_no_gap(write: Any, tmp_path: Path) -> None:
    """A whole fragment of nulls, and some unusable vectors elsewhere: dropped and not counted, yet right."""
    array = vectors(3000, DIM)
    array[10], array[11, 3] = np.nan, np.inf
    mask = np.zeros(3000, bool)
    mask[1000:2000] = True
    values = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), DIM, mask=pa.array(mask))
    for stable in (False, True):
        ds = write(values, name=f"stable-{stable}.lance", enable_stable_row_ids=stable)
        model = trained(ds)
        by_hand(ds, model, tmp_path / f"a{stable}")
        la.finalize(ds, "vector", without_counts(tmp_path / f"a{stable}"), fragment_ids=[0, 1, 2])
        counted = by_hand(
            ds, model, tmp_path / f"b{stable}", count=True, source=la.describe_source(ds, "vector")
        )
        la.finalize(ds, "vector", counted, name="counted")
        assert differences(stored(ds, "vector_idx"), stored(ds, "counted")) == (K, 0, 0)


def test_counted_drops_do_not_hide_a_fragment(ds: Any, tmp_path: Path) -> None:
    """A count that fits is not enough where a fragment has none of its rows in the artifact."""
    model = trained(ds)
    ids = [f.fragment_id for f in ds.get_fragments()]
    rows = ds.get_fragments()[1].count_rows()
    scan = la.prepared_vectors(ds, "vector", metric="l2", fragment_ids=[i for i in ids if i != ids[1]])
    encoder = la.CpuEncoder(model)
    made = la.PartitionArtifactBuilder(str(tmp_path / "a"), model)
    for batch in scan:
        part_id, pq_code = encoder.encode(batch["vector"])
        made.append_batch(
            pa.record_batch([batch["_rowid"], part_id, pq_code], ["_rowid", "__ivf_part_id", "__pq_code"])
        )
    artifact = made.finish(rows_dropped={"null": rows})
    refused(ds, artifact, f"{rows} rows .* have a vector", fragment_ids=ids)


@pytest.mark.parametrize("fifth", [0, 1])
@pytest.mark.parametrize("source", [False, True])
def test_a_builder_that_got_too_little(ds: Any, fifth: int, source: bool, tmp_path: Path) -> None:
    """Closed without any batch, or with a fifth of the rows: no index that claims every fragment."""
    model = trained(ds)
    options = {"source": la.describe_source(ds, "vector")} if source else {}
    ids = [f.fragment_id for f in ds.get_fragments()]
    artifact = by_hand(
        ds, model, tmp_path / "a", keep=lambda i: np.arange(len(i)) < fifth * len(i) / 5, **options
    )
    refused(ds, artifact, "account", fragment_ids=None if source else ids)
    if not source:
        refused(ds, without_counts(tmp_path / "a"), "have a vector", fragment_ids=ids)


def test_rows_of_another_fragment(ds: Any, tmp_path: Path) -> None:
    """It says fragment 1 and holds the rows of fragment 0, of which there are as many."""
    model = trained(ds)
    source = la.describe_source(ds, "vector", [1])
    artifact = by_hand(ds, model, tmp_path / "a", fragment_ids=[0], source=source)
    refused(ds, artifact, "not a row of the fragments")


def test_deleted_rows_are_not_indexed(ds: Any, tmp_path: Path) -> None:
    """Encoded without source, then deleted: the handle must be at the version that was encoded."""
    model = trained(ds)
    ids = [f.fragment_id for f in ds.get_fragments()]
    old = ds.checkout_version(ds.version)
    by_hand(ds, model, tmp_path / "a")
    uri = without_counts(tmp_path / "a")
    ds.delete("id < 10")
    refused(ds, uri, "account for 2000", fragment_ids=ids)
    la.finalize(old, "vector", uri, fragment_ids=ids)
    assert names(ds) == ["vector_idx"]
    latest = lance.dataset(ds.uri)
    found = latest.to_table(
        nearest={"column": "vector", "q": vectors(ROWS, DIM)[3], "k": 5, "nprobes": K, "refine_factor": 20}
    )
    assert all(i >= 10 for i in found["id"].to_pylist())


def test_as_many_rows_but_others(ds: Any, tmp_path: Path) -> None:
    """Ten rows were deleted, ten others are missing: counts fit, rows do not."""
    model = trained(ds)
    ids = [f.fragment_id for f in ds.get_fragments()]
    by_hand(ds, model, tmp_path / "a", keep=lambda i: np.arange(len(i)) >= 10)
    uri = without_counts(tmp_path / "a")
    assert la.Artifact.open(uri).num_rows < ROWS
    ds.delete("id >= 300 and id < 340")
    refused(ds, uri, "not a row of the fragments|account for", fragment_ids=ids)


def test_stable_row_ids_of_updated_rows(write: Any, tmp_path: Path) -> None:
    """An update moves rows to a new fragment under their old ids: both fragments know just their own."""
    ds = write(vectors(ROWS, DIM), enable_stable_row_ids=True)
    ds.update({"id": "id + 100000"}, where="id < 100")
    model = trained(ds)
    shards = [
        la.build_artifact(ds, "vector", model, tmp_path / str(f.fragment_id), backend="cpu", fragment_ids=[f.fragment_id])
        for f in ds.get_fragments()
    ]  # fmt: skip
    la.finalize(ds, "vector", shards)
    assert sum(map(len, stored(ds, "vector_idx"))) == ROWS
    old = by_hand(ds, model, tmp_path / "old", fragment_ids=[ds.get_fragments()[-1].fragment_id])
    with pytest.raises(la.ArtifactMismatchError, match=r"not a row of the fragments|account for"):
        la.finalize(ds, "vector", old, name="other", fragment_ids=[0])


def test_what_is_not_a_row_at_all(ds: Any, tmp_path: Path) -> None:
    model = trained(ds)
    with la.PartitionArtifactBuilder(str(tmp_path / "a"), model) as builder:
        builder.append_batch(encoded(ROWS, K, M, first=5 << 40))
    refused(ds, builder.artifact, "not a row of", fragment_ids=[f.fragment_id for f in ds.get_fragments()])
