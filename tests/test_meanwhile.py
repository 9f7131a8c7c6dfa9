"""An index that is extended or merged, and that others drop or build anew meanwhile: theirs stands, and no other comes back."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import lance
import pytest

import lance_artifact as la
from commits import before_commit, folders
from conftest import vectors
from lance_artifact import _extend, _merge
from test_extend import DIM, NEW, ROWS, append, build, segments

NAME = "vector_idx"
EXTEND, MERGE = (la.extend_index, _extend), (la.merge_segments, _merge)


def two_segments_and_new_rows(write: Callable[..., Any], **options: Any) -> Any:
    ds = write(vectors(ROWS, DIM))
    build(ds, **options)
    append(ds, vectors(NEW, DIM, seed=1))
    la.extend_index(ds.uri, NAME, backend="cpu", measure_fit=False)
    append(ds, vectors(NEW, DIM, seed=2), first=ROWS + NEW)
    return lance.dataset(ds.uri)


def between(monkeypatch: pytest.MonkeyPatch, what: Callable[[], Any]) -> None:
    """Let something happen between the last look at the dataset and Lance's commit, whichever commit that is, once."""
    done: list[bool] = []
    existing, commit = lance.LanceDataset.commit_existing_index_segments, lance.LanceDataset.commit

    def first() -> None:
        if not done:
            done.append(True)
            what()

    def of_segments(self: Any, *arguments: Any) -> Any:
        first()
        return existing(self, *arguments)

    def of_operation(*arguments: Any, **options: Any) -> Any:
        first()
        return commit(*arguments, **options)

    monkeypatch.setattr(lance.LanceDataset, "commit_existing_index_segments", of_segments)
    monkeypatch.setattr(lance.LanceDataset, "commit", staticmethod(of_operation))


WHEN: dict[str, Callable[..., None]] = {
    "before the commit": lambda patch, what, where: before_commit(patch, what, where),
    "at the commit": lambda patch, what, where: between(patch, what),
}


def refused(
    call: tuple[Callable[..., Any], ModuleType],
    when: str,
    ds: Any,
    change: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
    match: str = ".",
) -> None:
    """The call is a conflict, and leaves what the others made, and their files, as it is."""
    function, where = call
    then: list[Any] = []

    def meanwhile() -> None:
        change(lance.dataset(ds.uri))
        now = lance.dataset(ds.uri)
        then.append({i.name: segments(now, i.name) for i in now.describe_indices()})
        then.append(folders(ds))

    WHEN[when](monkeypatch, meanwhile, where)
    with pytest.raises(la.CommitConflictError, match=match):
        function(ds, NAME, **({"backend": "cpu"} if function is la.extend_index else {}))
    monkeypatch.undo()
    now = lance.dataset(ds.uri)
    assert {i.name: segments(now, i.name) for i in now.describe_indices()} == then[0]
    # All but ours, which is gone; with a commit that is sent and refused all the same.
    assert len(then[1] - folders(ds)) == 1 and folders(ds) <= then[1]
    now.optimize.optimize_indices()


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("call", [EXTEND, MERGE], ids=["extend", "merge"])
def test_an_index_that_is_dropped_stays_dropped(
    when: str,
    call: tuple[Callable[..., Any], ModuleType],
    write: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ds = two_segments_and_new_rows(write)
    refused(call, when, ds, lambda now: now.drop_index(NAME), monkeypatch, r"dropped|conflict")
    assert lance.dataset(ds.uri).describe_indices() == []


ANEW: dict[str, Callable[[Any], Any]] = {
    "another model": lambda now: build(now, replace=True, seed=9),
    "more partitions": lambda now: build(now, replace=True, num_partitions=16),
    "another metric": lambda now: build(now, replace=True, metric="cosine"),
    "graphs": lambda now: build(now, replace=True, index_type="IVF_HNSW_PQ"),
    "the same fragments": lambda now: build(now, replace=True, seed=9, fragment_ids=[0, 1, 2, 3]),
    "by stock": lambda now: build(now, stock=True, replace=True),
    "another column's": lambda now: (
        now.drop_index(NAME),
        now.create_scalar_index("id", "BTREE", name=NAME),
    ),
    "without rows": lambda now: now.create_index(
        "vector", "IVF_PQ", name=NAME, num_partitions=16, num_sub_vectors=8, replace=True, train=False
    ),
    "dropped, and some of it": lambda now: (
        now.drop_index(NAME),
        build(now, fragment_ids=[0], seed=9),
    ),
}


@pytest.mark.parametrize("anew", ANEW)
@pytest.mark.parametrize("call", [EXTEND, MERGE], ids=["extend", "merge"])
def test_an_index_that_is_built_anew_stays(
    call: tuple[Callable[..., Any], ModuleType],
    anew: str,
    write: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of another model, or whatever else: it is not taken for what was extended or merged."""
    # At the commit Lance finds two that have a name in common; the look that follows finds the rest.
    when = "at the commit" if anew == "the same fragments" else "before the commit"
    refused(call, when, two_segments_and_new_rows(write), ANEW[anew], monkeypatch)


@pytest.mark.parametrize("same_model", [False, True])
def test_an_index_that_covers_new_rows_too_stays(
    same_model: bool, write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that came meanwhile would lose their index. Of the same model it may have rows that the old one had not."""
    ds = two_segments_and_new_rows(write)
    la.extend_index(ds, NAME, backend="cpu", measure_fit=False)
    model = la.IvfPqModel.from_index(ds, NAME)
    given: dict[str, Any] = {"seed": 9}
    if same_model:
        given = {"ivf_centroids": model.ivf_centroids, "pq_codebook": model.pq_codebook}

    def anew(now: Any) -> None:
        append(now, vectors(NEW, DIM, seed=3), first=ROWS + 2 * NEW)
        build(lance.dataset(now.uri), replace=True, **given)

    refused(MERGE, "before the commit", ds, anew, monkeypatch, "is another one by now")


def test_what_is_extended_may_be_merged_meanwhile(
    write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = two_segments_and_new_rows(write)
    before_commit(monkeypatch, lambda: la.merge_segments(ds.uri, NAME), _extend)
    done = la.extend_index(ds, NAME, backend="cpu", measure_fit=False)
    assert done.segment in segments(ds) and sorted(map(sorted, segments(ds).values())) == [[0, 1, 2, 3], [4]]
    assert done.num_segments == 2


def test_all_rows_of_a_merged_segment_may_be_deleted_meanwhile(
    write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lance takes the segment out of the index then: that is no other index."""
    ds = two_segments_and_new_rows(write)
    before_commit(
        monkeypatch, lambda: lance.dataset(ds.uri).delete(f"id >= {ROWS} and id < {ROWS + NEW}"), _merge
    )
    merge = la.merge_segments(ds, NAME)
    assert list(segments(ds)) == [merge.segment]
