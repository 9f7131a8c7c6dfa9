"""The commit of a segment through the user's pylance handle, and what must hold after it."""

from __future__ import annotations

import copy
import dataclasses
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import lance
from lance.commit import CommitConflictError as CommitConflict
from lance.dataset import Index, LanceOperation

from . import _lance_artifact as core
from ._cancel import poll, shielded
from ._dataset import Handle
from ._log import LOGGER, log
from ._says import lance_says
from ._tidy import tidy_up
from ._undo import TRIES, Committed, answers_rightly, coverage, made_by, manifest, undo, versions_down
from ._wanted import Wanted, check_again, few
from .exceptions import CommitConflictError, LanceArtifactError, StorageError

T = TypeVar("T")

# Seconds between two looks for signals.
POLL_SECONDS = 0.05

# Seconds that a Ctrl-C waits for the answer of a commit that was sent.
ANSWER_SECONDS = 10.0


class AlreadyCommitted(LanceArtifactError):
    """Another process has committed the index of the same run."""


@dataclass
class Attempt:
    """A segment on its way, and what is known of it."""

    handle: Handle
    at: Handle
    uuid: str
    # "sent": Lance's commit was called, and it is not known whether it will happen.
    state: Literal["built", "sent", "committed"] = "built"
    # Somebody waits for the end: nothing new is begun.
    interrupted: bool = False

    def discard(self) -> None:
        """Delete the files, unless they are committed, or may be. Again does no harm."""
        if self.state == "sent":
            LOGGER.warning(
                "the files of index segment %s stay in _indices: its commit was sent and may still happen. If it does not, "
                "cleanup_old_versions() removes them",
                self.uuid,
            )
        elif self.state == "built":
            core.discard_segment(self.at.core, self.uuid)


@contextmanager
def attempt_of(handle: Handle, at: Handle, segment_uuid: str | None = None) -> Iterator[Attempt]:
    """A segment that is built and committed within, or leaves nothing behind."""
    attempt = Attempt(handle, at, segment_uuid or str(uuid.uuid4()))
    try:
        yield attempt
    except BaseException as error:
        # Ctrl-C may come between build and commit, when neither is there to clean up, and so may sys.exit() in a callback.
        tidy_up(error, attempt.discard)
        raise


def provenance(backend_name: str | None) -> dict[str, str]:
    """What index details say of who built a segment."""
    hints = {"lance_artifact.version": core.__version__}
    if backend_name:
        hints["lance_artifact.backend"] = backend_name
    return hints


def commit_segment(attempt: Attempt, wanted: Wanted, segment: core._Segment) -> None:
    """Commit through the user's handle, then look at what came of it.

    Lance would commit a segment whose fragments were rewritten meanwhile, with less coverage or none and without a word, and one
    whose files are gone. So what the segment was built from is compared with the latest version, as it is in the store now, and
    the commit is based on that one: it needs no older version. What changes between the comparison and the commit Lance refuses in
    most cases; in the others the comparison with the version that was committed finds it, and the commit is undone.
    """
    name = wanted.name
    # Cancelled now or not at all.
    poll()
    try:
        with shielded():
            to_its_end(lambda: _commit_and_look(attempt, wanted, segment), attempt)
    except BaseException as error:
        if _is_error(error) and not isinstance(error, LanceArtifactError):
            raise _translated(error, name, attempt) from error
        raise
    attempt.handle.refresh()
    log(
        "committed",
        "committed index {index}: segment {segment} of {rows} rows over {fragments} fragments, version {version}",
        index=name,
        segment=segment.uuid,
        rows=segment.num_rows,
        fragments=len(segment.fragment_ids),
        version=int(attempt.handle.user.version),
    )


def to_its_end(work: Callable[[], T], attempt: Attempt) -> T:
    """Run what must not be cut off in the middle: a Ctrl-C is raised when it is done, or its answer was waited for long enough."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    outcome: list[tuple[T | None, BaseException | None]] = []
    ended = threading.Event()

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="lance-artifact-commit")
    try:
        thread.start()
    except RuntimeError:
        # No thread can be had: signals come when they may.
        return work()
    try:
        # Not `join`: one that is interrupted takes the thread for ended. Not for ever: where a library lets signals interrupt no
        # system call, one that comes while this waits is only heard afterwards.
        while not ended.wait(POLL_SECONDS):
            pass
    except BaseException:
        attempt.interrupted = True
        ended.wait(ANSWER_SECONDS)
        raise
    result, error = outcome[0]
    if error is not None:
        raise error
    return cast(T, result)


def _commit_and_look(attempt: Attempt, wanted: Wanted, segment: core._Segment) -> None:
    done = _commit(attempt, wanted, segment)
    wrong = _wrong(attempt.at, segment, done)
    if wrong is not None:
        undone, advice = undo(attempt.at, done)
        # Whoever opened that version meanwhile goes on with it, where what it finds is right; a cleanup takes it, and then the files.
        if undone and not _is_usable(attempt.at, segment, done):
            attempt.state = "built"
        raise CommitConflictError(
            f"index {wanted.name!r} was committed, but {wrong}, at that moment; {advice} Build again."
        )


def _is_usable(at: Handle, segment: core._Segment, done: Committed) -> bool:
    """Whether the version that a commit made can be searched, and rightly. What cannot be looked at is not."""
    with suppress(Exception):
        return segment.missing_files(at.core) is None and answers_rightly(at, done)
    return False


def _wrong(at: Handle, segment: core._Segment, done: Committed) -> str | None:
    """What was taken from under the commit between the last look and it, if anything was."""
    try:
        if at.core.is_there(manifest(done.base)) is False:
            return "the dataset was removed and written anew"
        missing = segment.missing_files(at.core)
        if missing is not None or done.dataset is None:
            return missing
        changed = segment.changed_since(at.core, manifest(done.dataset))
        if changed is not None:
            return changed
        covered = coverage(done.dataset, done.uuid) or set()
    except Exception as error:
        # It is committed, and nothing speaks against it: only that it cannot be looked at.
        LOGGER.warning("the index is committed, but could not be looked at after that: %s", error)
        return None
    lost = sorted(done.fragment_ids - covered)
    if lost:
        return f"it does not cover fragments {few(lost)}: they were rewritten since version {at.version}"
    return None


def _commit(attempt: Attempt, wanted: Wanted, segment: core._Segment) -> Committed:
    name, handle, at = wanted.name, attempt.handle, attempt.at
    wanted = dataclasses.replace(wanted, metric=segment.metric)
    conflict: BaseException | None = None
    for _ in range(TRIES):
        base = handle.latest()
        checked = segment.check_commit(at.core, manifest(base), name)
        if checked is None:
            continue
        column, new_fragments = checked["column"], checked["new_fragment_ids"]
        ids = list(segment.fragment_ids)
        if wanted.run_id and core.segments_with(Handle.of(base).core, name, wanted.run_id):
            raise AlreadyCommitted(f"index {name!r} of run {wanted.run_id} is committed")
        # Lance extends an index to fragments that an update of other columns wrote; ours may not reach as far.
        gone = check_again(base, wanted, ids, frozenset(new_fragments))
        index = Index(
            uuid=segment.uuid,
            name=name,
            fields=[segment.field_id],
            # Nothing that it covers changed up to here, which was just compared.
            dataset_version=int(base.version),
            fragment_ids=cast(Any, set(ids)),  # pylance turns a set into its bitmap
            index_version=segment.index_version,
            index_details=segment.details,
        )
        previous = [_index(name, found) for found in checked["previous"]]
        # A commit moves the handle on.
        committed = copy.copy(base)
        # In this order: who interrupts looks at the state only after saying so.
        attempt.state = "sent"
        if attempt.interrupted:
            attempt.state = "built"
            break
        try:
            if gone:
                committed = _replace(base, index, previous, gone)
            else:
                committed.commit_existing_index_segments(name, column, [index])
            attempt.state = "committed"
            return Committed(committed, base, index, previous)
        except BaseException as error:
            # An answer may be lost on its way: what is there decides.
            happened, version = _look_for(at, base, segment.uuid)
            if happened:
                attempt.state = "committed"
            elif happened is False and not _may_come(error, handle):
                attempt.state = "built"
            if not _is_error(error):
                raise
            if happened:
                return Committed(version, base, index, previous)
            if not is_conflict(error):
                raise
            # Whether the other change matters is for the next round's comparison to say.
            conflict = error
    raise CommitConflictError(
        f"index {name!r} was not committed: {TRIES} times another change of the dataset came first; finalize again. "
        f"{lance_says(conflict)}"
    ) from conflict


def _index(name: str, found: dict[str, Any]) -> Index:
    return Index(name=name, **{**found, "fragment_ids": set(found["fragment_ids"])})


def _replace(
    base: lance.LanceDataset, index: Index, previous: list[Index], gone: set[str]
) -> lance.LanceDataset:
    """Replace segments that Lance would let stand; what ours does not cover is scanned without an index."""
    ours = set(cast(Any, index.fragment_ids))
    # Those that do not say what they cover are replaced, as Lance does it.
    removed = [
        old
        for old in previous
        if str(old.uuid) in gone or not old.fragment_ids or set(cast(Any, old.fragment_ids)) & ours
    ]
    operation = LanceOperation.CreateIndex(new_indices=[index], removed_indices=removed)
    return lance.LanceDataset.commit(base, operation, read_version=base.version, max_retries=0)


@contextmanager
def readable_commit(name: str, handle: Handle) -> Iterator[None]:
    """Errors of a commit that Lance makes by itself, as ours."""
    try:
        yield
    except LanceArtifactError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        kind = CommitConflictError if is_conflict(error) else StorageError
        raise kind(
            f"index {name!r} of {handle.core.uri} was not committed; the previous one stays. {lance_says(error)}"
        ) from error


def _is_error(error: BaseException) -> bool:
    """A failure, and not somebody's wish to end. A panic of Lance's is none of `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


# How Lance's errors of each kind begin. What follows names buckets and paths, which may be called anything.
_CONFLICT = re.compile(
    r"((lanceerror\(\w+\)|(wrapped|cloned|external|query execution) error): )*"
    r"(commit conflict for version|retryable commit conflict|incompatible transaction|too many concurrent writers|version conflict error)",
    re.IGNORECASE,
)


def is_conflict(error: BaseException) -> bool:
    """Whether Lance says that another change of the dataset came first, and so that its commit did not happen."""
    return isinstance(error, CommitConflict) or _CONFLICT.match(str(error).strip()) is not None


def _may_come(error: BaseException, handle: Handle) -> bool:
    """Whether a commit that failed, and is not there, may still happen: a store may have taken what it did not answer."""
    if not _is_error(error):
        return True
    remote = "://" in handle.location and not handle.location.startswith(("file", "memory"))
    return remote and not is_conflict(error) and not isinstance(error, ValueError)


def _translated(error: BaseException, name: str, attempt: Attempt) -> LanceArtifactError:
    message = f"index {name!r} of {attempt.at.core.uri} was not committed"
    if is_conflict(error):
        return CommitConflictError(
            f"{message}: another change of the dataset came first; build again from the latest version. {lance_says(error)}"
        )
    if "not found" in str(error).lower():
        return StorageError(
            f"{message}: the dataset or a version of it was moved or removed; open it anew. {lance_says(error)}"
        )
    if isinstance(error, OSError):
        unknown = (
            ". It may still happen, so the files of the segment stay until a cleanup"
            if attempt.state == "sent"
            else ""
        )
        return StorageError(
            f"{message}, or its answer was lost: the dataset could not be read or written; see describe_indices() before building "
            f"again{unknown}. {lance_says(error)}"
        )
    return CommitConflictError(f"{message}: Lance refuses it; the previous index stays. {lance_says(error)}")


def _look_for(
    at: Handle, base: lance.LanceDataset, segment_uuid: str
) -> tuple[bool | None, lance.LanceDataset | None]:
    """Whether the commit of a segment happened (None: that cannot be known), and the version that it made, if that is still there.

    Later versions may not have the segment any more, and the version itself may be cleaned up already.
    """
    try:
        latest = at.reopen(None)
        for version in versions_down(latest):
            if version <= int(base.version):
                break
            found = at.reopen(version)
            if made_by(found, segment_uuid):
                return True, found
        return coverage(latest, segment_uuid) is not None, None
    except Exception:
        return None, None
