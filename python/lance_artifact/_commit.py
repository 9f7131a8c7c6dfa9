"""The commit of a segment through the user's pylance handle, and what must hold before and after it."""

from __future__ import annotations

import copy
import dataclasses
import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import lance
from lance.dataset import Index, LanceOperation

from . import _lance_artifact as core
from ._dataset import Handle
from .exceptions import (
    CommitConflictError,
    IndexExistsError,
    InvalidInputError,
    LanceArtifactError,
    StorageError,
)

LOGGER = logging.getLogger("lance_artifact")

# Times that a commit is tried anew because another one came first.
TRIES = 10


@dataclass(frozen=True)
class Committed:
    """A commit: the handle that sees it, and what it was based on."""

    dataset: lance.LanceDataset
    base: lance.LanceDataset
    index: Index
    previous: list[Index]

    @property
    def before(self) -> bytes:
        manifest: bytes = cast(Any, self.base)._ds.serialized_manifest()
        return manifest

    @property
    def fragment_ids(self) -> set[int]:
        return set(cast(Any, self.index.fragment_ids))


def same_name(dataset: lance.LanceDataset, name: str) -> list[Any]:
    return [index for index in dataset.describe_indices() if index.name == name]


@dataclass(frozen=True)
class Wanted:
    """The index that is to be written."""

    name: str
    replace: bool
    field_id: int
    path: str
    index_type: str
    # None where only the artifacts know.
    metric: str | None


def check_name(
    dataset: lance.LanceDataset, wanted: Wanted, fragment_ids: list[int], may_lose: frozenset[int]
) -> bool:
    """Whether the index can be written over these fragments.

    An index of that name that exists is replaced where it covers nothing else, and gets one more segment where it covers none
    of them. Fragments of ``may_lose`` may lose their index; the answer is whether any does.
    """
    name = wanted.name
    same = same_name(dataset, name)
    for index in same:
        if list(index.fields) != [wanted.field_id]:
            raise InvalidInputError(
                f"name: index {name!r} is on {list(index.field_names)}, not on {wanted.path!r}; choose another name"
            )
    if same and not wanted.replace:
        raise IndexExistsError(
            f"Index name '{name}' already exists, please specify a different name or use replace=True"
        )
    there = {f.fragment_id for f in dataset.get_fragments()}
    intended = set(fragment_ids)
    losing: set[int] = set()
    for index in same:
        for segment in index.segments:
            covered = set(segment.fragment_ids) & there
            if covered & intended:
                losing |= covered - intended
            elif covered:
                _check_fits(index, segment, wanted)
    if losing - may_lose:
        raise InvalidInputError(
            f"fragment_ids: index {name!r} also covers fragments {_few(losing - may_lose)}, which would lose their index; build all "
            "of its fragments, or choose another name"
        )
    return bool(losing)


def _check_fits(index: Any, segment: Any, wanted: Wanted) -> None:
    """A segment that stays beside ours: queries are planned for both at once."""
    theirs = (index.index_type, str(index.details.get("metric_type", "")).lower() or None)
    ours = (wanted.index_type, wanted.metric or theirs[1])
    if theirs[1] is None:
        ours = (ours[0], None)
    if theirs != ours or list(segment.covering_fields):
        raise InvalidInputError(
            f"name: index {wanted.name!r} has a segment over fragments {_few(segment.fragment_ids)} that would stay, of type "
            f"{theirs[0]} and metric {theirs[1]}; one of {ours[0]} and {ours[1]} cannot be put beside it. Build all of its fragments, or "
            "choose another name"
        )


def commit_segment(handle: Handle, at: Handle, wanted: Wanted, segment: core._Segment) -> None:
    """Commit through the user's handle, then look at what came of it.

    Lance would commit a segment whose fragments were rewritten meanwhile, with less coverage or none and without a word, and one
    whose files are gone. So what the segment was built from is compared with the latest version, as it is in the store now, and
    the commit is based on that one: it needs no older version, and a rewrite after the comparison makes Lance refuse.
    """
    name = wanted.name
    try:
        done = _commit(handle, at, wanted, segment)
    except BaseException as error:
        # Where it is not known whether it happened, the files of an index that may be there must stay.
        discard_uncommitted(handle, at, segment.uuid)
        if isinstance(error, Exception) and not isinstance(error, LanceArtifactError):
            raise _translated(error, name) from error
        raise
    gone = _gone(at, segment, done.before)
    if gone is not None:
        raise CommitConflictError(
            f"index {name!r} was committed, but {gone} at that moment; {_undo(at, done)}"
        )
    handle.refresh()
    committed = _coverage(done.dataset, segment.uuid)
    if committed is None or not done.fragment_ids <= committed:
        lost = sorted(done.fragment_ids - (committed or set()))
        raise CommitConflictError(
            f"index {name!r} was committed, but does not cover fragments {_few(lost)}: they were rewritten since version "
            f"{at.version}; searches scan them without the index. Build again."
        )


def _commit(handle: Handle, at: Handle, wanted: Wanted, segment: core._Segment) -> Committed:
    name = wanted.name
    wanted = dataclasses.replace(wanted, metric=segment.metric)
    conflict: Exception | None = None
    for _ in range(TRIES):
        base = handle.latest()
        checked = segment.check_commit(at.core, cast(Any, base)._ds.serialized_manifest(), name)
        if checked is None:
            continue
        column, new_fragments = checked["column"], checked["new_fragment_ids"]
        ids = list(segment.fragment_ids)
        # Lance extends an index to fragments that an update of other columns wrote; ours may not reach as far.
        loses = check_name(base, wanted, ids, frozenset(new_fragments))
        version = int(base.version)
        index = Index(
            uuid=segment.uuid,
            name=name,
            fields=[segment.field_id],
            # Nothing that it covers changed up to here, which was just compared.
            dataset_version=version,
            fragment_ids=cast(Any, set(ids)),  # pylance turns a set into its bitmap
            index_version=segment.index_version,
            index_details=segment.details,
        )
        previous = [_index(name, found) for found in checked["previous"]]
        # A commit moves the handle on.
        committed = copy.copy(base)
        try:
            if loses:
                committed = _replace(base, index, previous)
            else:
                committed.commit_existing_index_segments(name, column, [index])
            return Committed(committed, base, index, previous)
        except Exception as error:
            # An answer may be lost on its way: what is there decides.
            there = _committed_in(handle, segment.uuid)
            if there is not None:
                return Committed(there, base, index, previous)
            if not _is_conflict(error):
                raise
            # Whether the other change matters is for the next round's comparison to say.
            conflict = error
    raise CommitConflictError(
        f"index {name!r} was not committed: {TRIES} times another change of the dataset came first; finalize again. "
        f"Lance says: {conflict}"
    ) from conflict


def _index(name: str, found: dict[str, Any]) -> Index:
    return Index(name=name, **{**found, "fragment_ids": set(found["fragment_ids"])})


def _replace(base: lance.LanceDataset, index: Index, previous: list[Index]) -> lance.LanceDataset:
    """Replace an index that reaches further; what ours does not cover is scanned without one."""
    ours = set(cast(Any, index.fragment_ids))
    # Those that do not say what they cover are replaced, as Lance does it.
    removed = [old for old in previous if not old.fragment_ids or set(cast(Any, old.fragment_ids)) & ours]
    operation = LanceOperation.CreateIndex(new_indices=[index], removed_indices=removed)
    return lance.LanceDataset.commit(base, operation, read_version=base.version, max_retries=0)


def discard_uncommitted(handle: Handle, at: Handle, segment_uuid: str) -> None:
    """Delete the files of a segment, unless it is committed, or that cannot be known. Again does no harm."""
    if not _is_committed(handle, segment_uuid):
        core.discard_segment(at.core, segment_uuid)


def _gone(at: Handle, segment: core._Segment, before: bytes) -> str | None:
    """What was taken from under the commit between the last look and it, if anything was."""
    try:
        if at.core.is_there(before) is False:
            return "the dataset was removed and written anew"
        segment.check_files(at.core)
    except CommitConflictError as error:
        return f"its files were removed ({error})"
    except LanceArtifactError as error:
        # It is committed, and nothing speaks against it: only that it cannot be looked at.
        LOGGER.warning("the index is committed, but could not be looked at after that: %s", error)
    return None


def _undo(at: Handle, done: Committed) -> str:
    """Take a commit back: what was there before is there again. The answer says whether, and what to do."""
    uuid = str(done.index.uuid)
    undone, advice = "the commit was undone. Build again.", "drop the index. Build again."
    with suppress(Exception):
        for _ in range(TRIES):
            latest = at.reopen(None)
            if _coverage(latest, uuid) is None:
                return undone
            with suppress(OSError, ValueError, RuntimeError):
                if at.core.is_there(done.before) is not False and _is_readable(latest):
                    _take_out(at, latest, done)
                    continue
                # Another dataset is there, of fewer versions maybe, and ours is a version of it.
                before = _before(latest, uuid)
                if before is None:
                    return advice
                advice = f"version {before} is as it was, but could not be restored: open that one, and write it anew. Build again."
                if _restore(at, before, latest):
                    return undone
        # Lance took none of them: the version right before.
        latest = at.reopen(None)
        before = _before(latest, uuid)
        if before is not None and before == int(latest.version) - 1 and _restore(at, before, latest):
            return undone
    return advice


def _take_out(at: Handle, latest: lance.LanceDataset, done: Committed) -> None:
    """Remove the index in a commit of its own; the segments that it replaced come back."""
    then = _without(at, latest, str(done.index.uuid)) or done.base
    field = done.index.fields[0]
    # Not for fragments that are others by now. Those that are in neither version stay named, as they were.
    changed = {f for f, _ in _column_files(latest, field).items() ^ _column_files(then, field).items()}
    previous = []
    for old in done.previous:
        if set(cast(Any, old.fragment_ids)) & done.fragment_ids:
            # Lance may have extended it since the look at it.
            covered = _coverage(then, str(old.uuid)) or set(cast(Any, old.fragment_ids))
            previous.append(dataclasses.replace(old, fragment_ids=cast(Any, covered - changed)))
    operation = LanceOperation.CreateIndex(new_indices=previous, removed_indices=[done.index])
    lance.LanceDataset.commit(latest, operation, read_version=latest.version, max_retries=0)


def _without(at: Handle, latest: lance.LanceDataset, uuid: str) -> lance.LanceDataset | None:
    """The last version before the commit of a segment, where it is still there."""
    for version in sorted((int(v["version"]) for v in latest.versions()), reverse=True):
        then = at.reopen(version)
        if _coverage(then, uuid) is None:
            return then
    return None


def _before(latest: lance.LanceDataset, uuid: str) -> int | None:
    """The version before the latest one, if the latest is the commit of the segment and nothing else.

    Lance may have put it behind a version that came meanwhile, so which one it is, its transaction says and no number.
    """
    version = int(latest.version)
    operation = getattr(cast(Any, latest).read_transaction(version), "operation", None)
    if uuid not in [str(index.uuid) for index in getattr(operation, "new_indices", [])]:
        return None
    return max((int(v["version"]) for v in latest.versions() if int(v["version"]) < version), default=None)


def _restore(at: Handle, before: int, latest: lance.LanceDataset) -> bool:
    restored: Any = at.reopen(before)
    restored.restore()
    came = int(restored.version) - 1
    if came == int(latest.version):
        return True
    # Lance lets a restore overwrite whatever came since the look at the latest version: that is what is wanted, index and all.
    cast(Any, at.reopen(came)).restore()
    return False


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


def _is_conflict(error: Exception) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("conflict", "incompatible", "concurrent", "contention"))


def _translated(error: Exception, name: str) -> LanceArtifactError:
    message = f"index {name!r} was not committed"
    if _is_conflict(error):
        return CommitConflictError(
            f"{message}: another change of the dataset came first; build again from the latest version. Lance says: {error}"
        )
    if isinstance(error, OSError):
        return StorageError(
            f"{message}, or its answer was lost: the dataset could not be read or written; see describe_indices() before building again. "
            f"Lance says: {error}"
        )
    return CommitConflictError(f"{message}: Lance refuses it; the previous index stays. Lance says: {error}")


def _coverage(dataset: lance.LanceDataset, segment_uuid: str) -> set[int] | None:
    for index in dataset.describe_indices():
        for segment in index.segments:
            if str(segment.uuid) == segment_uuid:
                return set(segment.fragment_ids)
    return None


def _committed_in(handle: Handle, segment_uuid: str) -> lance.LanceDataset | None:
    """The latest version, if the segment is in it, and that is certain."""
    with suppress(Exception):
        latest = handle.latest()
        if _coverage(latest, segment_uuid) is not None:
            return latest
    return None


def _is_committed(handle: Handle, segment_uuid: str) -> bool:
    """Also true where it cannot be known: files are kept then."""
    with suppress(Exception):
        return _coverage(handle.latest(), segment_uuid) is not None
    return True


def _few(ids: Any) -> str:
    listed = sorted(ids)
    return f"{listed[:10]}" + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")
