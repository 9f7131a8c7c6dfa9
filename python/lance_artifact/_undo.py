"""A commit that turns out wrong right after it was made, taken back: what was there before is there again."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import lance
from lance.dataset import Index, LanceOperation

from ._dataset import Handle

# Times that a commit is tried anew because another one came first.
TRIES = 10


@dataclass(frozen=True)
class Committed:
    """A commit of a segment.

    Attributes
    ----------
    dataset : lance.LanceDataset or None
        The version that it made, and no later one; None where that is gone already.
    base : lance.LanceDataset
        The version that it was based on.
    index : Index
    previous : list of Index
        The segments of that name in ``base``.
    """

    dataset: lance.LanceDataset | None
    base: lance.LanceDataset
    index: Index
    previous: list[Index]

    @property
    def uuid(self) -> str:
        return str(self.index.uuid)

    @property
    def fragment_ids(self) -> set[int]:
        return set(cast(Any, self.index.fragment_ids))


def manifest(dataset: lance.LanceDataset) -> bytes:
    serialized: bytes = cast(Any, dataset)._ds.serialized_manifest()
    return serialized


def coverage(dataset: lance.LanceDataset, segment_uuid: str) -> set[int] | None:
    """The fragments of a segment; None where a version does not have it."""
    for index in dataset.describe_indices():
        for segment in index.segments:
            if str(segment.uuid) == segment_uuid:
                return set(segment.fragment_ids)
    return None


def made_by(dataset: lance.LanceDataset, segment_uuid: str) -> bool:
    """Whether this very version is the commit of a segment. Numbers do not say it: Lance commits behind what came meanwhile."""
    try:
        operation = getattr(cast(Any, dataset).read_transaction(int(dataset.version)), "operation", None)
    except TypeError:
        # pylance cannot show a compaction that rewrote an index.
        return False
    return segment_uuid in [str(index.uuid) for index in getattr(operation, "new_indices", [])]


def versions_down(dataset: lance.LanceDataset) -> list[int]:
    return sorted((int(v["version"]) for v in dataset.versions()), reverse=True)


def undo(at: Handle, done: Committed) -> tuple[bool, str]:
    """Take a commit back. Whether it was, and what to say of it."""
    undone, advice = (True, "the commit was undone."), "drop the index."
    with suppress(Exception):
        for _ in range(TRIES):
            latest = at.reopen(None)
            if coverage(latest, done.uuid) is None:
                return undone
            with suppress(OSError, ValueError, RuntimeError):
                if at.core.is_there(manifest(done.base)) is not False and _is_readable(latest):
                    _take_out(at, latest, done)
                    continue
                # Another dataset is there, of fewer versions maybe, and ours is a version of it.
                if not made_by(latest, done.uuid):
                    break
                before = _before(latest)
                if before is None:
                    advice = "the dataset was removed, and what is there is this commit alone: remove it too."
                    break
                advice = f"version {before} is as it was, but could not be restored: open that one, and write it anew."
                overwritten = _restore(at, before, latest)
                return undone if overwritten is None else (False, overwritten)
        # Lance took none of them: the version right before.
        latest = at.reopen(None)
        before = _before(latest)
        if made_by(latest, done.uuid) and before is not None and before == int(latest.version) - 1:
            overwritten = _restore(at, before, latest)
            return undone if overwritten is None else (False, overwritten)
    return False, advice


def answers_rightly(at: Handle, done: Committed) -> bool:
    """Whether searches of the version that a commit made are right, however little its segment covers: what that is of is unchanged."""
    if done.dataset is None or at.core.is_there(manifest(done.base)) is False:
        return False
    covered = coverage(done.dataset, done.uuid)
    field = done.index.fields[0]
    then, now = _column_files(done.base, field), _column_files(done.dataset, field)
    before = {f.fragment_id: f.num_deletions for f in done.base.get_fragments()}
    after = {f.fragment_id: f.num_deletions for f in done.dataset.get_fragments()}
    # Of a fragment that is gone Lance hides what a segment holds. Rows that are back are in none.
    return covered is not None and all(
        f in then and then[f] == now.get(f) and before[f] <= after[f] for f in covered & after.keys()
    )


def _take_out(at: Handle, latest: lance.LanceDataset, done: Committed) -> None:
    """Remove the index in a commit of its own; the segments that it replaced come back."""
    then = _without(at, latest, done.uuid)
    field = done.index.fields[0]
    old = {str(index.uuid): index for index in done.previous}
    # Lance may have extended them since the look at them, or taken them out with their column.
    covered = {uuid: set(cast(Any, index.fragment_ids)) for uuid, index in old.items()}
    if then is not None:
        now = {uuid: coverage(then, uuid) for uuid in old}
        covered = {uuid: fragments for uuid, fragments in now.items() if fragments is not None}
    # Not for fragments that are others by now. Those that are in neither version stay named, as they were.
    compared = done.base if then is None else then
    files = _column_files(latest, field).items() ^ _column_files(compared, field).items()
    changed = {fragment for fragment, _ in files}
    previous = [
        dataclasses.replace(old[uuid], fragment_ids=cast(Any, fragments - changed))
        for uuid, fragments in covered.items()
        if coverage(latest, uuid) is None
    ]
    operation = LanceOperation.CreateIndex(new_indices=previous, removed_indices=[done.index])
    lance.LanceDataset.commit(latest, operation, read_version=latest.version, max_retries=0)


def _without(at: Handle, latest: lance.LanceDataset, uuid: str) -> lance.LanceDataset | None:
    """The last version before the commit of a segment, where it is still there."""
    for version in versions_down(latest):
        then = at.reopen(version)
        if coverage(then, uuid) is None:
            return then
    return None


def _before(dataset: lance.LanceDataset) -> int | None:
    return next((v for v in versions_down(dataset) if v < int(dataset.version)), None)


def _restore(at: Handle, before: int, latest: lance.LanceDataset) -> str | None:
    """Restore a version over the latest one; what to do where others committed at that moment, which a restore overwrites."""
    restored: Any = at.reopen(before)
    restored.restore()
    came = int(restored.version) - 1
    if came == int(latest.version):
        return None
    # That is wanted back, index and all.
    again: Any = at.reopen(came)
    again.restore()
    lost = range(int(restored.version) + 1, int(again.version))
    if not lost:
        return "drop the index."
    return (
        f"drop the index, and look at versions {lost[0]} to {lost[-1]}, which others committed at that moment: the latest version does not "
        "have their changes."
    )


def _is_readable(dataset: lance.LanceDataset) -> bool:
    """Whether the files that a version names are there: a cleanup takes versions, and not what a later one names."""
    try:
        cast(Any, dataset).head(1)
    except (OSError, ValueError) as error:
        if "not found" in str(error).lower():
            return False
        raise
    return True


def _column_files(dataset: lance.LanceDataset, field: int) -> dict[int, tuple[str, ...]]:
    """For each fragment the data files that hold the column."""
    return {
        f.fragment_id: tuple(file.path for file in f.metadata.files if field in file.fields)
        for f in dataset.get_fragments()
        if not f.metadata.overlays
    }
