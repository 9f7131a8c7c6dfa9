"""The moment of the commit: what happened to the dataset or to the segment meanwhile, and what killed builds leave."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

import lance_artifact as la
from commits import BUILD, DIM, ROWS, K, M, append, before_commit, cleanup, folders, nearest, written
from conftest import LINUX, leftovers, segment, vectors
from lance_artifact import _create_index
from lance_artifact._dataset import Handle


@pytest.fixture(params=[False, True], ids=["addresses", "stable"])
def ds(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return written(tmp_path / "t.lance", request.param)


def test_a_cleanup_that_takes_the_segment(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    la.create_index(ds, "vector", **BUILD)
    old = segment(ds, "vector_idx").uuid
    before_commit(monkeypatch, lambda: cleanup(ds, unverified=True))
    with pytest.raises(la.CommitConflictError, match="delete_unverified"):
        la.create_index(ds, "vector", replace=True, **BUILD)
    latest = lance.dataset(ds.uri)
    assert segment(latest, "vector_idx").uuid == old and folders(ds) == {old}
    assert nearest(latest, vectors(ROWS, DIM)[9]) == 9
    latest.optimize.optimize_indices()


@pytest.mark.parametrize("replace", [False, True])
def test_a_cleanup_and_an_append(replace: bool, ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version that was built from is gone by then: nothing needs it."""
    if replace:
        la.create_index(ds, "vector", **BUILD)

    def meanwhile() -> None:
        append(ds)
        cleanup(ds)

    before_commit(monkeypatch, meanwhile)
    la.create_index(ds, "vector", replace=replace, **BUILD)
    latest = lance.dataset(ds.uri)
    assert set(segment(latest, "vector_idx").fragment_ids) == {0, 1, 2}
    assert nearest(latest, vectors(ROWS, DIM)[9]) == 9
    assert nearest(latest, vectors(50, DIM, seed=3)[9]) == ROWS + 9


@pytest.mark.parametrize("look", [1, 2, 3])
def test_others_append_and_index_that_between_two_looks(
    look: int, ds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever look it comes, it came meanwhile: it is not taken for a part of the index that was there and would stay."""
    la.create_index(ds, "vector", **BUILD)
    latest, looks = Handle.latest, []

    def looked(self: Handle) -> Any:
        found = latest(self)
        looks.append(found.version)
        if len(looks) == look:
            append(ds)
            la.extend_index(lance.dataset(ds.uri), "vector_idx", backend="cpu")
        return found

    monkeypatch.setattr(Handle, "latest", looked)
    la.create_index(ds, "vector", replace=True, **{**BUILD, "seed": 5})
    monkeypatch.undo()
    assert len(looks) >= look
    now = lance.dataset(ds.uri)
    # Those rows are indexed where the build did not replace their segment, and scanned where it did.
    assert {0, 1, 2} <= set(segment(now, "vector_idx").fragment_ids) <= {0, 1, 2, 3}
    assert nearest(now, vectors(ROWS, DIM)[9]) == 9
    assert nearest(now, vectors(50, DIM, seed=3)[9]) == ROWS + 9


@pytest.mark.parametrize("index_before", [False, True])
def test_another_column_is_updated_meanwhile(
    index_before: bool, ds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lance extends the index that is there to the rows that moved; the new one replaces it all the same."""
    if index_before:
        la.create_index(ds, "vector", **BUILD)
    before_commit(monkeypatch, lambda: lance.dataset(ds.uri).update({"id": "id + 100000"}, where="id < 20"))
    la.create_index(ds, "vector", replace=True, **BUILD)
    latest = lance.dataset(ds.uri)
    array = vectors(ROWS, DIM)
    assert [nearest(latest, array[n]) for n in (3, 19, 20, 700)] == [100003, 100019, 20, 700]
    found = latest.to_table(
        nearest={"column": "vector", "q": array[3], "k": ROWS, "nprobes": K, "refine_factor": 1}
    )
    assert len(set(found["id"].to_pylist())) == found.num_rows


def test_deleted_rows_that_come_back(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleted before the build, restored meanwhile: rows of covered fragments that the index does not have."""
    first = ds.version
    ds.delete("id < 30 or id = 700")
    before_commit(monkeypatch, lambda: lance.dataset(ds.uri, version=first).restore())
    with pytest.raises(la.CommitConflictError, match=r"fragments \[0, 1\] that were deleted"):
        la.create_index(ds, "vector", **BUILD)
    latest = lance.dataset(ds.uri)
    assert latest.count_rows() == ROWS and latest.describe_indices() == [] and folders(ds) == set()


def test_a_fragment_is_emptied_meanwhile(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are in the index: they must take no place from those that live."""
    before_commit(monkeypatch, lambda: lance.dataset(ds.uri).delete("id < 990"))
    la.create_index(ds, "vector", **BUILD)
    latest = lance.dataset(ds.uri)
    assert 0 not in [f.fragment_id for f in latest.get_fragments()]
    alive = ROWS - 990
    for query in vectors(ROWS, DIM)[:5]:
        found = latest.to_table(
            nearest={"column": "vector", "q": query, "k": alive, "nprobes": K, "refine_factor": 1},
            fast_search=True,
        )
        assert sorted(found["id"].to_pylist()) == list(range(990, ROWS))


def cast(ds: Any) -> None:
    lance.dataset(ds.uri).alter_columns({"path": "vector", "data_type": pa.list_(pa.float16(), DIM)})


CHANGES: dict[str, Callable[[Any], Any]] = {
    "dropped": lambda ds: lance.dataset(ds.uri).drop_columns(["vector"]),
    "cast": cast,
    "dropped and added": lambda ds: (
        lance.dataset(ds.uri).drop_columns(["vector"]),
        lance.dataset(ds.uri).add_columns({"vector": "arrow_cast([1.0], 'FixedSizeList(1, Float32)')"}),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_column_changes_meanwhile(change: str, ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before_commit(monkeypatch, lambda: CHANGES[change](ds))
    with pytest.raises(la.CommitConflictError, match="dropped or changed its type"):
        la.create_index(ds, "vector", **BUILD)
    assert lance.dataset(ds.uri).describe_indices() == [] and folders(ds) == set()


def test_the_column_is_renamed_meanwhile(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before_commit(
        monkeypatch, lambda: lance.dataset(ds.uri).alter_columns({"path": "vector", "name": "embedding"})
    )
    la.create_index(ds, "vector", name="i", **BUILD)
    latest = lance.dataset(ds.uri)
    assert [list(i.field_names) for i in latest.describe_indices()] == [["embedding"]]
    found = latest.to_table(
        nearest={"column": "embedding", "q": vectors(ROWS, DIM)[9], "k": 1, "nprobes": K, "refine_factor": 50}
    )
    assert found["id"].to_pylist() == [9]


@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), OSError("LanceError(IO): 500 Internal Server Error")]
)
def test_the_manifest_cannot_be_written(error: OSError, ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    la.create_index(ds, "vector", **BUILD)
    old, version = segment(ds, "vector_idx").uuid, ds.version

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(lance.LanceDataset, "commit_existing_index_segments", fails)
    with pytest.raises(la.StorageError, match="not committed"):
        la.create_index(ds, "vector", replace=True, **BUILD)
    latest = lance.dataset(ds.uri)
    assert (latest.version, segment(latest, "vector_idx").uuid, folders(ds)) == (version, old, {old})


WITHOUT_PRIVILEGES = """
import ctypes, os, struct, sys
# Root may write anywhere: drop what lets it (capset with empty sets).
header, nothing = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0)), ctypes.create_string_buffer(24)
assert os.geteuid() != 0 or ctypes.CDLL(None).capset(header, nothing) == 0
import lance, lance_artifact as la
try:
    la.create_index(lance.dataset(sys.argv[1]), "vector", replace=True, num_partitions=4, num_sub_vectors=4, sample_rate=5, max_iters=2, backend="cpu")
except la.StorageError as error:
    print(error)
    sys.exit(42)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="drops the capabilities of Linux")
@pytest.mark.parametrize("folder", ["_versions", "_indices"])
def test_a_folder_that_cannot_be_written(folder: str, ds: Any) -> None:
    la.create_index(ds, "vector", **BUILD)
    old = segment(ds, "vector_idx").uuid
    (Path(ds.uri) / folder).chmod(0o555)
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_PRIVILEGES, ds.uri], check=False, capture_output=True, text=True
    )
    (Path(ds.uri) / folder).chmod(0o755)
    assert run.returncode == 42, run.stderr
    assert folder != "_versions" or "not committed" in run.stdout
    latest = lance.dataset(ds.uri)
    assert (latest.version, segment(latest, "vector_idx").uuid, folders(ds)) == (ds.version, old, {old})


def test_an_index_that_reaches_further_is_known_before_training(
    ds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    la.create_index(ds, "vector", **BUILD)
    monkeypatch.setattr(_create_index, "train_handle", None)
    with pytest.raises(la.InvalidInputError, match=r"also covers fragments \[1, 2\]"):
        la.create_index(ds, "vector", replace=True, fragment_ids=[0], **BUILD)
    with pytest.raises(la.IndexExistsError):
        la.create_index(ds, "vector", fragment_ids=[0], **BUILD)


@pytest.mark.parametrize("by_run", [False, True])
def test_an_index_that_moved_with_a_compaction_is_a_conflict(by_run: bool, ds: Any, tmp_path: Path) -> None:
    """A handle from before it sees an index of fragments that it does not have: no mistake of the caller, who opens the table anew."""
    la.create_index(ds, "vector", **BUILD)
    old = lance.dataset(ds.uri)
    lance.dataset(ds.uri).optimize.compact_files()
    run: dict[str, Any] = {"artifact_uri": tmp_path / "run", "resume": True} if by_run else {}
    version, there = lance.dataset(ds.uri).version, leftovers(tmp_path)
    with pytest.raises(la.CommitConflictError, match=r"fragments \[3\], all of which came since"):
        la.create_index(old, "vector", replace=True, **BUILD, **run)
    assert lance.dataset(ds.uri).version == version and leftovers(tmp_path) == there
    la.create_index(lance.dataset(ds.uri), "vector", replace=True, **BUILD, **run)


def test_a_second_segment_beside_the_first(ds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fragments that no segment covers yet get one of their own, of the same model."""
    la.create_index(ds, "vector", fragment_ids=[0, 1], **BUILD)
    with pytest.raises(la.InvalidInputError, match="would not be replaced; to add a segment"):
        la.create_index(ds, "vector", fragment_ids=[2], replace=True, **BUILD)
    with monkeypatch.context() as patch:
        patch.setattr(_create_index, "train_handle", None)
        with pytest.raises(la.ArtifactMismatchError, match="one trained now would be another"):
            la.create_index(ds, "vector", fragment_ids=[2], append=True, **BUILD)
        with pytest.raises(la.ArtifactMismatchError, match="one trained now would be another"):
            la.create_index(ds, "vector", fragment_ids=[2], append=True, artifact_uri=tmp_path / "a", **BUILD)
        with pytest.raises(la.ArtifactMismatchError, match="one trained now would be another"):
            la.create_index(
                ds, "vector", fragment_ids=[2], append=True, artifact_uri=tmp_path / "a", resume=True, **BUILD
            )
    model = la.IvfPqModel.from_index(ds, "vector_idx")
    given = {"ivf_centroids": model.ivf_centroids, "pq_codebook": model.pq_codebook, "num_sub_vectors": M}
    la.create_index(ds, "vector", fragment_ids=[2], append=True, backend="cpu", **given)
    index = next(i for i in ds.describe_indices() if i.name == "vector_idx")
    assert sorted(sorted(s.fragment_ids) for s in index.segments) == [[0, 1], [2]]


def test_a_column_that_took_the_name_of_another(ds: Any, tmp_path: Path) -> None:
    """Encoded, renamed, and a new column under the old name: the index is of the column that is meant, or there is none."""
    model = la.train(ds, "vector", **BUILD)
    artifact = la.build_artifact(ds, "vector", model, tmp_path / "a", backend="cpu")
    lance.dataset(ds.uri).alter_columns({"path": "vector", "name": "old_vector"})
    fresh = lance.dataset(ds.uri)
    la.finalize(fresh, "old_vector", artifact)
    assert [(i.name, list(i.field_names)) for i in fresh.describe_indices()] == [
        ("old_vector_idx", ["old_vector"])
    ]
    fresh.add_columns({"vector": f"arrow_cast({[0.5] * DIM}, 'FixedSizeList({DIM}, Float32)')"})
    with pytest.raises(la.ArtifactMismatchError, match="did not exist"):
        la.finalize(lance.dataset(ds.uri), "vector", artifact)
    la.finalize(lance.dataset(ds.uri), "old_vector", artifact, replace=True)
    assert len(lance.dataset(ds.uri).describe_indices()) == 1


@pytest.mark.parametrize(
    "other", [{"metric": "cosine"}, {"index_type": "IVF_HNSW_PQ"}, {"stock": "IVF_FLAT"}], ids=str
)
def test_a_segment_that_does_not_fit_beside_another(
    other: dict[str, Any], ds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "stock" in other:
        uncommitted = ds.create_index_uncommitted(
            "vector", other["stock"], num_partitions=2, fragment_ids=[0]
        )
        ds.commit_existing_index_segments("vector_idx", "vector", [uncommitted])
        other = {}
    else:
        la.create_index(ds, "vector", fragment_ids=[0], **BUILD)
    version = ds.version
    monkeypatch.setattr(_create_index, "train_handle", None)
    with pytest.raises(la.InvalidInputError, match="cannot be put beside it"):
        la.create_index(ds, "vector", fragment_ids=[1, 2], append=True, **{**BUILD, **other})
    monkeypatch.undo()
    assert lance.dataset(ds.uri).version == version
    la.create_index(ds, "vector", replace=True, **{**BUILD, **other})
    assert set(segment(ds, "vector_idx").fragment_ids) == {0, 1, 2}


@pytest.mark.parametrize("when", ["shuffle", "merge_partitions"])
def test_the_index_grows_while_it_is_built_anew(when: str, ds: Any) -> None:
    """New rows, and an index that covers them: the one that is built since before does not, and replaces it all the same."""
    la.create_index(ds, "vector", **BUILD)
    done = []

    def meanwhile(step: Any) -> None:
        if step.stage == when and not done:
            done.append(True)
            append(ds)
            lance.dataset(ds.uri).optimize.optimize_indices(num_indices_to_merge=1)
            lance.dataset(ds.uri).update({"id": "id + 100000"}, where="id < 5")

    la.create_index(ds, "vector", replace=True, progress=meanwhile, **BUILD)
    assert done
    latest = lance.dataset(ds.uri)
    assert nearest(latest, vectors(ROWS, DIM)[9]) == 9
    assert nearest(latest, vectors(ROWS, DIM)[3]) == 100003
    assert nearest(latest, vectors(50, DIM, seed=3)[9]) == ROWS + 9


def test_an_artifact_that_another_writer_replaced_is_not_deleted(ds: Any, tmp_path: Path) -> None:
    where = tmp_path / "shared"
    done = []

    def meanwhile(step: Any) -> None:
        if step.stage == "merge_partitions" and step.event == "complete" and not done:
            done.append(True)
            model = la.train(ds, "vector", seed=9, **BUILD)
            la.build_artifact(ds, "vector", model, where, backend="cpu", overwrite=True)

    la.create_index(ds, "vector", artifact_uri=where, keep_artifact=False, progress=meanwhile, **BUILD)
    assert done and la.Artifact.open(where).verify().ok
    la.create_index(ds, "vector", replace=True, artifact_uri=tmp_path / "own", keep_artifact=False, **BUILD)
    assert not (tmp_path / "own").exists()


# What killed builds leave

LEAVE = """
import os, sys
import lance, lance_artifact as la
import lance_artifact._finalize as module
module.commit_segment = lambda *a: os.kill(os.getpid(), 9)
la.create_index(lance.dataset(sys.argv[1]), "vector", num_partitions=4, num_sub_vectors=4, sample_rate=5, max_iters=2, backend="cpu")
"""


@LINUX
def test_a_killed_builds_segment_is_removed_by_the_next(ds: Any) -> None:
    assert subprocess.run([sys.executable, "-c", LEAVE, ds.uri], check=False).returncode == -9
    left = folders(ds)
    assert len(left) == 1
    # Others' are not touched: without marks, and of a process that lives.
    strangers = {str(uuid.uuid4()): None, str(uuid.uuid4()): la._lance_artifact.owner_marks()}
    for name, marks in strangers.items():
        folder = Path(ds.uri) / "_indices" / name
        folder.mkdir()
        (folder / "auxiliary.idx").write_bytes(b"x")
        if marks:
            (folder / ".lance-artifact-owner").write_text(marks)
    la.create_index(ds, "vector", **BUILD)
    assert folders(ds) == {*strangers, segment(ds, "vector_idx").uuid}
    names = {p.name for p in (Path(ds.uri) / "_indices" / segment(ds, "vector_idx").uuid).iterdir()}
    assert names == {"auxiliary.idx", "index.idx"}


def test_a_committed_index_has_no_marks(ds: Any) -> None:
    for index_type in ("IVF_PQ", "IVF_HNSW_PQ"):
        la.create_index(ds, "vector", index_type, name=index_type, sync=True, **BUILD)
    assert not [f for f in leftovers(Path(ds.uri)) if "lance-artifact" in f]
