"""`merge_segments`: the segments of an index put together, without rows that are not live any more."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import _lance_artifact as core
from ._arguments import Progress
from ._calls import awaited
from ._checked import checked
from ._codebook_rate import said_of_codebook
from ._commit import attempt_of, commit_segment, provenance
from ._dataset import Handle
from ._index import CommittedIndex, model_of, segments_now
from ._process import terminable
from ._progress import reporter
from ._run_files import HINT
from ._wanted import Known, Wanted, check_name

if TYPE_CHECKING:
    import lance


@dataclass(frozen=True)
class Merge:
    """What `merge_segments` did.

    Attributes
    ----------
    name : str
    segment : str or None
        UUID of the new segment; None where there was nothing to merge.
    merged : tuple of str
        UUIDs of the segments that it replaces.
    num_rows : int
        Rows in it.
    rows_dropped : int
        Rows of the old ones that are deleted, or updated, since.
    rows_missing : int
        Live rows of the fragments covered that no segment held. Rows without a usable vector are such; others searches never find.
    num_segments : int
        Of the index now.
    """

    name: str
    segment: str | None
    merged: tuple[str, ...]
    num_rows: int
    rows_dropped: int
    rows_missing: int
    num_segments: int

    def __str__(self) -> str:
        if self.segment is None:
            return f"index {self.name!r}: one segment without a deleted row, nothing to merge"
        missing = f", {self.rows_missing:,} live rows in none of them" if self.rows_missing else ""
        return (
            f"index {self.name!r}: {len(self.merged)} segments merged into one of {self.num_rows:,} rows, {self.rows_dropped:,} dropped"
            f"{missing}; {self.num_segments} segments"
        )


@terminable()
@awaited
@checked
def merge_segments(
    dataset: lance.LanceDataset | str | Path,
    name: str,
    *,
    num_indices_to_merge: int | None = None,
    memory_limit: int | None = None,
    sync: bool = False,
    progress: Progress = False,
) -> Merge:
    """Put the segments of an index together and commit the one that comes of it in their place.

    Codes are copied, and no vector is read: the segments must be of one model. Rows that were deleted or updated since, also those of
    a single segment, are left out. The index covers the same fragments as before.

    Parameters
    ----------
    dataset : lance.LanceDataset, LanceDB table, or path
        Its latest version is merged, and its handle sees the new segment afterwards.
    name : str
        Of an IVF_PQ or IVF_HNSW_PQ index, whoever built its segments. Graphs are built anew, by Lance.
    num_indices_to_merge : int, optional
        The newest segments only, as in pylance's ``optimize_indices``. Default all.
    memory_limit : int, optional
        As in `finalize`.
    sync : bool, default False
        As in `finalize`.
    progress : bool or callable, default False

    Returns
    -------
    Merge

    Raises
    ------
    InvalidInputError
        There is no such index, or it is of another type or an older format.
    ArtifactMismatchError
        Its segments are of different models.
    CommitConflictError
        Fragments were rewritten meanwhile, or others merged, dropped or replaced the index. It stays as they left it, and nothing is left
        behind.
    """
    handle = Handle.of(dataset, commits=True)
    at = handle.at(int(handle.latest().version))
    index = CommittedIndex.of(at, name)
    model_of(at, index)
    chosen = list(index.segments)[-(num_indices_to_merge or len(index.segments)) :]
    fragments = [fragment for uuid in chosen for fragment in index.segments[uuid]]
    wanted = Wanted(
        name,
        "replace",
        index.field_id,
        index.path,
        index.index_type,
        index.metric,
        known=Known(frozenset(index.segments), {uuid: index.segments[uuid] for uuid in chosen}),
    )
    check_name(at.dataset, wanted, fragments, frozenset())
    with attempt_of(handle, at) as attempt:
        segment, model, num_rows, dropped, missing = core.merge_segments(
            at.core,
            name,
            chosen,
            attempt.uuid,
            index_type=index.index_type,
            m=index.m,
            ef_construction=index.ef_construction,
            max_level=index.max_level,
            hints={**provenance(None), **_run_of(at, index, chosen), **said_of_codebook(index.hints)},
            sync=sync,
            memory_limit=memory_limit,
            progress=reporter(progress),
        )
        left = len(index.segments) - len(chosen) + 1
        if segment is None:
            handle.refresh()
            return Merge(name, None, (), num_rows, dropped, missing, left)
        commit_segment(attempt, dataclasses.replace(wanted, model=model), segment)
        count = segments_now(handle, name, left)
        return Merge(name, attempt.uuid, tuple(chosen), num_rows, dropped, missing, count)


def _run_of(at: Handle, index: CommittedIndex, chosen: list[str]) -> dict[str, str]:
    """The hint by which a run knows its index, where one of the segments has it: what comes of them has its rows. Stock keeps it too."""
    run_id = index.hints.get(HINT)
    if run_id and set(core.segments_with(at.core, index.name, run_id)) & set(chosen):
        return {HINT: run_id}
    return {}
