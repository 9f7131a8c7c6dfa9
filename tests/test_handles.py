"""What the extension reads and commits to is what the user's handle is: branch, version, place, and no other dataset."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import accelerate, column, leftovers, segment, stored, vectors

K, M, DIM, ROWS = 4, 4, 16, 1500
BUILD: dict[str, Any] = {"num_partitions": K, "num_sub_vectors": M, "sample_rate": 5, "max_iters": 2, "num_bits": 8, "backend": "cpu"}  # fmt: skip


def table(rows: int, seed: int, first: int = 0) -> pa.Table:
    return pa.table(
        {"id": pa.array(range(first, first + rows)), "vector": column(vectors(rows, DIM, seed=seed))}
    )


def nearest(ds: Any, query: np.ndarray) -> int:
    found = ds.to_table(nearest={"column": "vector", "q": query, "k": 1, "nprobes": K, "refine_factor": 50})
    return int(found["id"][0].as_py())


def test_a_branch_is_built_from_and_committed_to(tmp_path: Path) -> None:
    ds = lance.write_dataset(table(ROWS, 1), str(tmp_path / "t.lance"), max_rows_per_file=600)
    la.create_index(ds, "vector", **BUILD)
    on_main = segment(ds, "vector_idx").uuid
    branch = ds.create_branch("exp")
    branch.insert(table(500, 2, first=ROWS))
    ds.delete("id < 100")  # main goes its own way
    for way, handle in {
        "made": branch,
        "checked out": lance.dataset(ds.uri).checkout_version(("exp", None)),
    }.items():
        la.create_index(handle, "vector", name=f"of {way}", replace=True, **BUILD)
        index = segment(handle, f"of {way}")
        folder = tmp_path / "t.lance/tree/exp/_indices" / index.uuid
        assert sorted(p.name for p in folder.iterdir()) == ["auxiliary.idx", "index.idx"]
        assert handle.stats.index_stats(f"of {way}")["num_indexed_rows"] == ROWS + 500
        assert nearest(handle, vectors(500, DIM, seed=2)[3]) == ROWS + 3
    main = lance.dataset(ds.uri)
    assert segment(main, "vector_idx").uuid == on_main and len(main.describe_indices()) == 1
    assert nearest(main, vectors(ROWS, DIM, seed=1)[200]) == 200


def test_a_tag_of_a_branch(tmp_path: Path) -> None:
    ds = lance.write_dataset(table(ROWS, 1), str(tmp_path / "t.lance"))
    branch = ds.create_branch("exp")
    branch.insert(table(500, 2, first=ROWS))
    ds.tags.create("of-branch", ("exp", branch.version))
    tagged = lance.dataset(ds.uri).checkout_version("of-branch")
    assert tagged.count_rows() == ROWS + 500
    la.create_index(tagged, "vector", **BUILD)
    assert lance.dataset(ds.uri).describe_indices() == []
    seen = lance.dataset(ds.uri).checkout_version(("exp", None))
    assert seen.stats.index_stats("vector_idx")["num_indexed_rows"] == ROWS + 500


def test_an_artifact_of_a_branch_is_not_one_of_main(tmp_path: Path) -> None:
    ds = lance.write_dataset(table(ROWS, 1), str(tmp_path / "t.lance"))
    branch = ds.create_branch("exp")
    model = la.train(branch, "vector", **BUILD)
    artifact = la.build_artifact(branch, "vector", model, tmp_path / "a", backend="cpu")
    assert artifact.manifest["source"]["branch"] == "exp"
    # The same rows of the same files, and yet not what was said.
    with pytest.raises(la.ArtifactMismatchError, match="branch"):
        la.finalize(ds, "vector", artifact)
    la.finalize(branch, "vector", artifact)
    assert lance.dataset(ds.uri).describe_indices() == []


def test_a_lancedb_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lancedb

    from lance_artifact.backends.cpu import CpuBackend

    accelerate(monkeypatch, CpuBackend())
    t = lancedb.connect(str(tmp_path)).create_table("t", table(ROWS, 1))
    branch = t.branches.create("exp")
    branch.add(table(500, 2, first=ROWS))
    arguments = {
        "num_partitions": K,
        "num_sub_vectors": M,
        "vector_column_name": "vector",
        "accelerator": "cuvs",
    }
    branch.create_index("l2", **arguments)
    query = vectors(500, DIM, seed=2)[3]
    assert branch.search(query).limit(1).nprobes(K).refine_factor(50).to_list()[0]["id"] == ROWS + 3
    assert t.list_indices() == [] and t.count_rows() == ROWS


def test_a_relative_path_and_a_changed_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another dataset of that name lies where the process is now: it is neither read nor written."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    other = lance.write_dataset(table(ROWS, 9), str(tmp_path / "there/t.lance"))
    monkeypatch.chdir(tmp_path / "here")
    lance.write_dataset(table(ROWS, 1), "t.lance")
    ds = lance.dataset("t.lance")
    monkeypatch.chdir(tmp_path / "there")
    before = leftovers(tmp_path / "there")
    model = la.train(ds, "vector", **BUILD)
    artifact = la.build_artifact(ds, "vector", model, tmp_path / "a", backend="cpu")
    assert artifact.manifest["source"]["dataset_uri"] == str(tmp_path / "here/t.lance")
    la.finalize(ds, "vector", artifact)
    la.create_index(ds, "vector", name="again", **BUILD)
    assert len(lance.dataset(str(tmp_path / "here/t.lance")).describe_indices()) == 2
    assert leftovers(tmp_path / "there") == before and other.describe_indices() == []
    assert nearest(ds, vectors(ROWS, DIM, seed=1)[7]) == 7


@pytest.mark.parametrize("what", ["written anew", "grown since", "removed"])
def test_a_stale_handle_does_not_touch_what_took_its_place(what: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "t.lance")
    ds = lance.write_dataset(table(ROWS, 1), uri)
    model = la.train(ds, "vector", **BUILD)
    artifact = la.build_artifact(ds, "vector", model, tmp_path / "a", backend="cpu")
    shutil.rmtree(uri)
    if what != "removed":
        new = lance.write_dataset(table(ROWS, 2), uri)
        if what == "grown since":
            new.insert(table(10, 3, first=ROWS))
    before = leftovers(Path(uri))
    for call in (
        lambda: la.create_index(ds, "vector", **BUILD),
        lambda: la.finalize(ds, "vector", artifact),
        lambda: la.train(ds, "vector", **BUILD),
        lambda: la.build_artifact(ds, "vector", model, tmp_path / "b", backend="cpu"),
        lambda: la.prepared_vectors(ds, "vector", metric="l2"),
    ):
        with pytest.raises((la.CommitConflictError, la.StorageError), match="new handle"):
            call()
    assert leftovers(Path(uri)) == before
    if what != "removed":
        assert nearest(lance.dataset(uri), vectors(ROWS, DIM, seed=2)[4]) == 4
        with pytest.raises(la.ArtifactMismatchError, match=r"another dataset|encoded from version"):
            la.finalize(lance.dataset(uri), "vector", artifact)


def test_written_anew_between_build_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lance_artifact import _finalize

    uri = str(tmp_path / "t.lance")
    ds = lance.write_dataset(table(ROWS, 1), uri)
    commit = _finalize.commit_segment

    def removed_first(*arguments: Any) -> None:
        shutil.rmtree(uri)
        lance.write_dataset(table(ROWS, 2), uri)
        commit(*arguments)

    monkeypatch.setattr(_finalize, "commit_segment", removed_first)
    with pytest.raises(la.CommitConflictError):
        la.create_index(ds, "vector", **BUILD)
    fresh = lance.dataset(uri)
    assert (fresh.version, fresh.describe_indices()) == (1, [])
    assert nearest(fresh, vectors(ROWS, DIM, seed=2)[4]) == 4


def test_one_handle_shared_by_threads(tmp_path: Path) -> None:
    ds = lance.write_dataset(table(ROWS, 1), str(tmp_path / "t.lance"))
    stop = threading.Event()
    errors: list[BaseException] = []

    def use() -> None:
        while not stop.is_set():
            try:
                ds.checkout_latest()
                ds.count_rows()
            except RuntimeError:
                pass  # pylance itself, when two threads meet
            time.sleep(0.002)

    def build(name: str) -> None:
        try:
            la.create_index(ds, "vector", name=name, **BUILD)
        except BaseException as error:
            errors.append(error)

    users = [threading.Thread(target=use) for _ in range(2)]
    builders = [threading.Thread(target=build, args=(f"i{n}",)) for n in range(4)]
    for thread in users + builders:
        thread.start()
    for thread in builders:
        thread.join()
    stop.set()
    for thread in users:
        thread.join()
    assert errors == []
    assert len(lance.dataset(ds.uri).describe_indices()) == 4


def test_an_older_version_is_what_is_read(tmp_path: Path) -> None:
    ds = lance.write_dataset(table(ROWS, 1), str(tmp_path / "t.lance"))
    lance.write_dataset(table(500, 2, first=ROWS), ds.uri, mode="append")
    old = lance.dataset(ds.uri, version=1)
    la.create_index(old, "vector", **BUILD)
    assert sum(map(len, stored(lance.dataset(ds.uri), "vector_idx"))) == ROWS
    assert nearest(lance.dataset(ds.uri), vectors(500, DIM, seed=2)[3]) == ROWS + 3


def test_artifacts_stay_out_of_the_dataset(tmp_path: Path) -> None:
    ds = lance.write_dataset(table(ROWS, 1), str(tmp_path / "t.lance"))
    before = leftovers(tmp_path)
    for place in (
        tmp_path / "t.lance",
        tmp_path / "t.lance" / "artifact",
        f"file://{tmp_path}/t.lance/x",
        tmp_path,
    ):
        with pytest.raises(la.InvalidInputError, match="artifact_uri"):
            la.create_index(ds, "vector", artifact_uri=place, **BUILD)
    assert leftovers(tmp_path) == before
