"""Commits that turn out wrong right after Lance made them: what was there before is there again, and nobody's rows are lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

import lance_artifact as la
from commits import BUILD, ROWS, append, at_the_commit, cleanup, folders, nearest, written
from conftest import column, segment, vectors


@pytest.fixture(params=[False, True], ids=["addresses", "stable"])
def ds(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return written(tmp_path / "t.lance", request.param)


def remove_files(root: Path, uuid: str) -> None:
    for path in (root / "_indices" / uuid).iterdir():
        path.unlink()


def refused(*_: Any, **__: Any) -> Any:
    raise OSError("Commit conflict for version 3")


@pytest.mark.parametrize("on_branch", [False, True])
@pytest.mark.parametrize("also", [False, True], ids=["alone", "with another commit"])
def test_files_that_vanish_at_the_commit(
    also: bool, on_branch: bool, ds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A race that no check can close: it is found after, undone and said."""
    main = ds
    if on_branch:
        ds.create_branch("exp")
        ds = ds.checkout_version(("exp", None))
    la.create_index(ds, "vector", **BUILD)
    old = segment(ds, "vector_idx").uuid
    root = Path(main.uri) / ("tree/exp" if on_branch else "")

    def deleted() -> None:
        if also:
            ds.checkout_version(ds.version).delete("id = 1")

    at_the_commit(monkeypatch, deleted, lambda uuid: remove_files(root, uuid))
    with pytest.raises(la.CommitConflictError, match="undone"):
        la.create_index(ds, "vector", replace=True, **BUILD)
    latest = lance.dataset(main.uri).checkout_version(("exp" if on_branch else None, None))
    assert segment(latest, "vector_idx").uuid == old
    assert latest.count_rows() == ROWS - also
    assert nearest(latest, vectors(ROWS, 16)[9]) == 9
    if on_branch:
        assert lance.dataset(main.uri).describe_indices() == [] and lance.dataset(main.uri).version == 1


def test_the_version_before_is_cleaned_up(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older one, which a tag holds, is no way back."""
    ds.tags.create("first", ds.version)
    append(ds)
    ds = lance.dataset(ds.uri)

    def gone(uuid: str) -> None:
        remove_files(Path(ds.uri), uuid)
        cleanup(ds)

    at_the_commit(monkeypatch, after=gone)
    with pytest.raises(la.CommitConflictError, match="undone"):
        la.create_index(ds, "vector", **BUILD)
    latest = lance.dataset(ds.uri)
    assert latest.count_rows() == ROWS + 50 and latest.describe_indices() == []


def test_the_previous_index_is_as_it_was(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a fragment that it names and that is gone."""
    la.create_index(ds, "vector", **BUILD)
    # Not all of the fragment at once: Lance takes it out of the index then.
    ds.delete("id < 499")
    ds.update({"id": "id + 100000"}, where="id = 499")
    ds = lance.dataset(ds.uri)
    before = segment(ds, "vector_idx")
    at_the_commit(monkeypatch, lambda: cleanup(ds, unverified=True))
    with pytest.raises(la.CommitConflictError, match="undone"):
        la.create_index(ds, "vector", replace=True, **BUILD)
    after = segment(lance.dataset(ds.uri), "vector_idx")
    assert (after.uuid, set(after.fragment_ids)) == (before.uuid, set(before.fragment_ids))


def test_the_previous_index_grew_at_that_moment(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lance extends an index to the rows that an update of another column moved: also that is as it was."""
    la.create_index(ds, "vector", fragment_ids=[0, 1, 2], **BUILD)
    append(ds)
    latest = lance.dataset(ds.uri)

    def grown() -> None:
        cleanup(ds, unverified=True)
        lance.dataset(ds.uri).update({"id": "id + 100000"}, where="id < 7")
        before.append(set(segment(lance.dataset(ds.uri), "vector_idx").fragment_ids))

    before: list[set[int]] = []
    at_the_commit(monkeypatch, grown)
    with pytest.raises(la.CommitConflictError, match="undone"):
        la.create_index(latest, "vector", replace=True, **BUILD)
    assert before == [set(segment(lance.dataset(ds.uri), "vector_idx").fragment_ids)]
    assert nearest(lance.dataset(ds.uri), vectors(ROWS, 16)[3]) == 100003


def new_vectors(ds: Any) -> tuple[Any, list[int]]:
    """Fragment 0 with a new file for the column, not yet committed, and the fields that it changes."""
    fragment = ds.get_fragment(0)
    row_ids = fragment.to_table(columns=[], with_row_id=True)["_rowid"]
    new = pa.table({"_rowid": row_ids, "vector": column(vectors(500, 16, seed=77))})
    changed: tuple[Any, list[int]] = fragment.update_columns(new, "_rowid")
    return changed


def merged(ds: Any) -> None:
    latest = lance.dataset(ds.uri)
    fragment, _ = new_vectors(latest)
    fragments = [fragment, *(f.metadata for f in latest.get_fragments()[1:])]
    operation = lance.LanceOperation.Merge(fragments, latest.lance_schema)
    lance.LanceDataset.commit(latest, operation, read_version=latest.version)


def updated(ds: Any) -> None:
    latest = lance.dataset(ds.uri)
    fragment, fields = new_vectors(latest)
    operation = lance.LanceOperation.Update(updated_fragments=[fragment], fields_modified=fields)
    lance.LanceDataset.commit(latest, operation, read_version=latest.version)


@pytest.mark.parametrize("change", [merged, updated], ids=lambda c: c.__name__)
@pytest.mark.parametrize("index_before", [False, True])
def test_vectors_written_anew_at_the_commit(
    index_before: bool, change: Any, ds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lance commits over some changes of the column, with coverage that is false, or less than was asked for."""
    if index_before:
        la.create_index(ds, "vector", **BUILD)
    at_the_commit(monkeypatch, lambda: change(ds))
    with pytest.raises(la.CommitConflictError, match=r"were rewritten by version.*undone"):
        la.create_index(ds, "vector", replace=index_before, **BUILD)
    latest = lance.dataset(ds.uri)
    new = vectors(500, 16, seed=77)
    assert bool(latest.describe_indices()) == index_before
    assert [nearest(latest, new[n]) for n in (3, 333)] == [3, 333]
    assert nearest(latest, vectors(ROWS, 16)[777]) == 777


@pytest.mark.parametrize("change", ["dropped", "cast"])
@pytest.mark.parametrize("index_before", [False, True])
def test_the_column_goes_at_the_commit(
    index_before: bool, change: str, ds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if index_before:
        la.create_index(ds, "vector", **BUILD)

    def changed() -> None:
        latest = lance.dataset(ds.uri)
        if change == "dropped":
            latest.drop_columns(["vector"])
        else:
            # Lance casts no column that has an index.
            for index in latest.describe_indices():
                latest.drop_index(index.name)
            latest.alter_columns({"path": "vector", "data_type": pa.list_(pa.float16(), 16)})

    at_the_commit(monkeypatch, changed)
    with pytest.raises(la.CommitConflictError, match=r"dropped or changed its type.*[Bb]uild again"):
        la.create_index(ds, "vector", replace=index_before, **BUILD)
    latest = lance.dataset(ds.uri)
    assert latest.describe_indices() == [] and latest.count_rows() == ROWS
    latest.optimize.optimize_indices()


def test_all_rows_are_deleted_at_the_commit(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    la.create_index(ds, "vector", **BUILD)
    ds = lance.dataset(ds.uri)
    before = segment(ds, "vector_idx")
    at_the_commit(monkeypatch, lambda: lance.dataset(ds.uri).delete("true"))
    with pytest.raises(la.CommitConflictError, match=r"were deleted by version.*undone"):
        la.create_index(ds, "vector", replace=True, **BUILD)
    after = segment(lance.dataset(ds.uri), "vector_idx")
    assert (after.uuid, set(after.fragment_ids)) == (before.uuid, set(before.fragment_ids))


def test_who_has_opened_what_is_undone_goes_on(ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are right, and for that its files are there, until a cleanup takes the version."""
    la.create_index(ds, "vector", **BUILD)
    old = segment(ds, "vector_idx").uuid
    append(ds)
    opened: list[Any] = []
    at_the_commit(
        monkeypatch,
        lambda: lance.dataset(ds.uri).delete(f"id >= {ROWS}"),
        lambda uuid: opened.append((uuid, lance.dataset(ds.uri))),
    )
    with pytest.raises(la.CommitConflictError, match=r"were deleted by version.*undone"):
        la.extend_index(lance.dataset(ds.uri), "vector_idx")
    ((uuid, reader),) = opened
    assert uuid in {str(s.uuid) for s in reader.describe_indices()[0].segments}
    assert reader.stats.index_stats("vector_idx")["num_indexed_rows"] == ROWS
    assert nearest(reader, vectors(ROWS, 16)[9]) == 9
    assert segment(lance.dataset(ds.uri), "vector_idx").uuid == old
    cleanup(ds)
    assert folders(ds) == {old}


@pytest.mark.parametrize("versions", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("cleaned", [False, True], ids=["", "without old versions"])
@pytest.mark.parametrize("fragment_ids", [None, [1]], ids=["all fragments", "one fragment"])
def test_written_anew_at_the_commit(
    fragment_ids: list[int] | None, cleaned: bool, versions: int, ds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lance commits to whatever dataset is there, behind the latest of its versions: that one is as it was afterwards."""
    append(ds)
    append(ds)
    ds = lance.dataset(ds.uri)

    def written_anew() -> None:
        shutil.rmtree(ds.uri)
        new = written(Path(ds.uri), ds.has_stable_row_ids, seed=8)
        for _ in range(versions - 1):
            append(new)
        if cleaned:
            cleanup(new, unverified=True)

    at_the_commit(monkeypatch, written_anew)
    with pytest.raises(la.CommitConflictError, match=r"not committed|undone"):
        la.create_index(ds, "vector", fragment_ids=fragment_ids, **BUILD)
    latest = lance.dataset(ds.uri)
    assert latest.describe_indices() == [] and folders(ds) == set()
    assert latest.count_rows() == ROWS + 50 * (versions - 1)
    assert nearest(latest, vectors(ROWS, 16, seed=8)[9]) == 9


def test_written_anew_with_other_row_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lance restores no version without stable row ids over one with them: it is there, and the error names it."""
    ds = written(tmp_path / "t.lance", stable=True)

    def written_anew() -> None:
        shutil.rmtree(ds.uri)
        written(Path(ds.uri), stable=False, seed=8)

    at_the_commit(monkeypatch, written_anew)
    with pytest.raises(la.CommitConflictError, match="written anew, at that moment; version 1 is as it was"):
        la.create_index(ds, "vector", **BUILD)
    before = lance.dataset(ds.uri, version=1)
    assert before.describe_indices() == [] and nearest(before, vectors(ROWS, 16, seed=8)[9]) == 9


@pytest.mark.parametrize("came", [False, True], ids=["", "another version came"])
def test_only_a_restore_takes_it_back(came: bool, ds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Lance refuses every commit that takes the index out. Rows that came after it are not lost by that."""

    def gone(uuid: str) -> None:
        remove_files(Path(ds.uri), uuid)
        if came:
            append(ds)

    at_the_commit(monkeypatch, after=gone)
    monkeypatch.setattr(lance.LanceDataset, "commit", staticmethod(refused))
    with pytest.raises(la.CommitConflictError, match="drop the index" if came else "undone"):
        la.create_index(ds, "vector", **BUILD)
    latest = lance.dataset(ds.uri)
    assert latest.count_rows() == ROWS + 50 * came
    assert bool(latest.describe_indices()) == came


@pytest.mark.parametrize("often", [1, 2])
def test_another_version_comes_before_the_restore(
    often: int, ds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lance lets a restore overwrite anything: what came in that moment is there again, or is named."""
    restore, done = lance.LanceDataset.restore, []

    def after_an_append(self: Any) -> Any:
        if len(done) < often:
            done.append(True)
            append(ds)
        return restore(self)

    at_the_commit(monkeypatch, after=lambda uuid: remove_files(Path(ds.uri), uuid))
    monkeypatch.setattr(lance.LanceDataset, "commit", staticmethod(refused))
    monkeypatch.setattr(lance.LanceDataset, "restore", after_an_append)
    with pytest.raises(la.CommitConflictError, match="drop the index") as raised:
        la.create_index(ds, "vector", **BUILD)
    assert len(done) == often and lance.dataset(ds.uri).count_rows() == ROWS + 50
    named = "versions 5 to 5, which others committed" in str(raised.value)
    assert named == (often == 2)
    if named:
        assert lance.dataset(ds.uri, version=5).count_rows() == ROWS + 50
