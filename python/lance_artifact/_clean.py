"""`clean_run`: what a run and builds that were killed left, listed or removed; nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import _lance_artifact as core
from ._arguments import StorageOptions
from ._artifacts import MANIFEST, bare_files, delete_artifact
from ._calls import awaited
from ._checked import checked
from ._damaged import CLAIM, MOST_MARKS, damaged, delete_damaged
from ._dataset import Handle
from ._lance_artifact import Artifact, shown_uri
from ._log import LOGGER
from ._process import terminable
from ._run import Run
from ._run_files import COMMITTED, MODEL, PLAN, SHARDS
from ._uploads import OpenUploads
from ._wanted import few
from .exceptions import ArtifactNotFoundError, CommitConflictError, CorruptArtifactError, LanceArtifactError

UNFINISHED = ".lance-artifact-"


@dataclass(frozen=True)
class Leftover:
    """Something that a build left.

    Attributes
    ----------
    kind : {"attempt", "upload", "segment", "artifact", "run"}
        Files of an attempt at a shard that came to nothing; an upload to S3 that was never completed; an index segment that was not
        committed; the artifact of a shard; the files of the run itself.
    uri : str
        Without credentials.
    files : int
    """

    kind: str
    uri: str
    files: int

    def __str__(self) -> str:
        return f"{self.kind:8}  {self.uri}  {self.files} files"


@terminable()
@awaited
@checked
def clean_run(
    uri: str | Path,
    dataset: Any = None,
    *,
    everything: bool = False,
    elsewhere: bool = False,
    dry_run: bool = False,
    storage_options: StorageOptions | None = None,
    dataset_storage_options: StorageOptions | None = None,
) -> list[Leftover]:
    """Remove what killed tries of a run left: files of unfinished attempts at its shards, and unfinished segments of ours in its dataset.

    What a process that is alive, or one elsewhere that may be, is working on stays. Uploads to S3 that were never completed are ended too,
    where boto3 is installed; those of other stores end by themselves, or by a rule of the bucket.

    Parameters
    ----------
    uri : str or path
        Of the run.
    dataset : lance.LanceDataset, LanceDB table, or path, optional
        Default: the planned one, where it can be opened.
    everything : bool, default False
        Also the run itself: its artifacts, model and plan. An index that was committed stays. Of a shard whose manifest is damaged all
        files go that have names of ours, with a warning.
    elsewhere : bool, default False
        Also what processes of other machines and containers have begun. Whether they are still there cannot be known here, so that without
        it they count as gone after seven days in which they wrote nothing. Say it only of processes that you have stopped.
    dry_run : bool, default False
        Only list.

    Returns
    -------
    list of Leftover
        What was, or would be, removed.

    Raises
    ------
    CorruptArtifactError
        Without ``everything``: the manifest of a shard cannot be read, so that it is not known which of its files are needed.
    CommitConflictError
        ``everything``, and a process is at work on a shard, or one elsewhere may be: plan and model stay.
    """
    run = Run.open(uri, storage_options=storage_options, dataset_storage_options=dataset_storage_options)
    return [
        *_shards(run, everything, elsewhere, dry_run),
        *_segments(run, dataset, dry_run),
        *_run(run, everything, elsewhere, dry_run),
    ]


def discard_run(run: Run, dataset: Any) -> None:
    """Remove a run whose index is committed. The index stands either way."""
    try:
        clean_run(run.uri, dataset, everything=True, storage_options=run.storage_options)
    except LanceArtifactError as error:
        LOGGER.warning(
            "the index is committed; its run %s could not be removed, and clean_run removes it: %s",
            shown_uri(run.uri),
            error,
        )


def _shards(run: Run, everything: bool, elsewhere: bool, dry_run: bool) -> list[Leftover]:
    uploads = OpenUploads(run.uri, run.storage_options)
    looked = []
    for shard in range(len(run.plan.shards)):
        # Before the claims, which come before any upload: those of who begins after that look are not among them.
        opened = list(uploads.below(f"{SHARDS}/{shard:05}"))
        looked.append((opened, *_unfinished(run, shard, elsewhere, everything)))
    busy = [shard for shard, (_, _, is_busy) in enumerate(looked) if is_busy]
    if everything and busy:
        raise _at_work(run, busy, elsewhere)
    found: list[Leftover] = []
    for shard, (opened, files, is_busy) in enumerate(looked):
        place = run.shard_uri(shard)
        # Before the claims go, by which it is known that nobody is at work.
        if not is_busy:
            found += _ended(uploads, opened, dry_run)
        if files:
            found.append(Leftover("attempt", shown_uri(place), len(files)))
            if not dry_run:
                core.delete_unfinished(place, run.storage_options, elsewhere)
        if not everything:
            continue
        try:
            artifact = Artifact.open(place, run.storage_options)
        except ArtifactNotFoundError:
            continue
        except CorruptArtifactError as error:
            found.append(_removed_damaged(run, shard, elsewhere, dry_run, error))
            continue
        files = list(bare_files(place, run.storage_options)) or [
            MANIFEST,
            *artifact.manifest.get("files", ()),
        ]
        found.append(Leftover("artifact", shown_uri(place), len(files)))
        if not dry_run:
            delete_artifact(place, run.storage_options)
    return found


def _removed_damaged(
    run: Run, shard: int, elsewhere: bool, dry_run: bool, error: CorruptArtifactError
) -> Leftover:
    """A shard of which it cannot be read what belongs to it: everything that builds of ours have written there."""
    place = run.shard_uri(shard)
    there = damaged(place, run.storage_options, elsewhere)
    if there.is_busy:
        raise _at_work(run, [shard], elsewhere)
    LOGGER.warning(
        "%s cannot be read; all files there that have names of ours %s: %s",
        shown_uri(place),
        "would be removed" if dry_run else "are removed",
        error,
    )
    files = list(bare_files(place, run.storage_options)) or there.files
    if not dry_run:
        delete_damaged(place, files, run.storage_options)
    return Leftover("artifact", shown_uri(place), len(files))


def _unfinished(run: Run, shard: int, elsewhere: bool, everything: bool = True) -> tuple[list[str], bool]:
    """Files of attempts at a shard that are over, and whether one is at work."""
    place = run.shard_uri(shard)
    try:
        files, is_busy = core.unfinished_files(place, run.storage_options, elsewhere)
    except CorruptArtifactError:
        # Which files its artifact needs is not known: that matters only where those stay.
        if not everything:
            raise
        return [], damaged(place, run.storage_options, elsewhere).is_busy
    # What has no manifest by its format has an unfinished attempt's names.
    if (files or is_busy) and bare_files(place, run.storage_options):
        return [], False
    return files, is_busy


def _at_work(run: Run, busy: list[int], elsewhere: bool) -> CommitConflictError:
    """Why a run is not removed: somebody is at work on these shards, or may be."""
    alive = [shard for shard in busy if elsewhere or _unfinished(run, shard, True)[1]]
    if alive:
        return CommitConflictError(
            f"{shown_uri(run.uri)}: a process is at work on shards {few(alive)}; stop it first"
        )
    owners = sorted({who for shard in busy for who in _owners(run.shard_uri(shard), run.storage_options)})
    said = "; ".join(owners[:10]) + (f"; and {len(owners) - 10} more" if len(owners) > 10 else "")
    return CommitConflictError(
        f"{shown_uri(run.uri)}: shards {few(busy)} are being encoded, or were left, by processes of which it cannot be known here whether they are "
        f"alive: {said or 'they left no marks'}. Stop them, and pass elsewhere=True (--elsewhere), or wait: those that "
        "wrote nothing for seven days count as gone"
    )


def _owners(place: str, storage_options: Any) -> list[str]:
    """Whose the claims on a shard are, for people."""
    found = []
    for name, size, _ in core.list_folder(place, "", storage_options):
        if size is None or (name != CLAIM and not name.startswith(f"{CLAIM}-")):
            continue
        try:
            if size > MOST_MARKS:
                raise ValueError
            owner = json.loads(core.read_file(place, name, storage_options) or b"")["owner"]
            since = datetime.fromtimestamp(owner["at"], UTC).strftime("%Y-%m-%d %H:%M UTC")
            # The name of the machine, before its boot and its process namespace.
            found.append(f"process {int(owner['pid'])} on {owner['host'].split(' ')[0]!r} since {since}")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError, RecursionError):
            found.append(f"one that left {name} without readable marks")
    return found


def _ended(uploads: OpenUploads, opened: list[tuple[str, str]], dry_run: bool) -> list[Leftover]:
    found = []
    for uri, upload in opened:
        found.append(Leftover("upload", uri, 1))
        if not dry_run:
            uploads.abort(uri, upload)
    return found


def _segments(run: Run, dataset: Any, dry_run: bool) -> list[Leftover]:
    try:
        handle = Handle.of(dataset if dataset is not None else run.opened())
    except LanceArtifactError:
        if dataset is not None:
            raise
        # Gone with all that was in it, or not to be reached from here: then there is nothing to be removed.
        return []
    latest = Handle.of(handle.latest())
    found: list[Leftover] = []
    uploads = OpenUploads(latest.location, latest.dataset.latest_storage_options())
    for uuid in core.unfinished_segments(latest.core):
        found += _ended(uploads, list(uploads.below(f"_indices/{uuid}")), dry_run)
        found.append(Leftover("segment", f"{latest.uri}/_indices/{uuid}", 1))
        if not dry_run:
            core.discard_segment(latest.core, uuid)
    return found


def _run(run: Run, everything: bool, elsewhere: bool, dry_run: bool) -> list[Leftover]:
    """The plan goes last, so that what is left at any moment is still known to be a run."""
    if not everything:
        return []
    there = [name for name, size, _ in core.list_folder(run.uri, "", run.storage_options) if size is not None]
    # A process that was killed while it wrote one of them has left it under such a name.
    unfinished = sorted(name for name in there if name.startswith(UNFINISHED))
    files = unfinished + [name for name in (MODEL, COMMITTED, PLAN) if name in there]
    if not dry_run:
        # Who began while the rest was removed needs the plan and the model.
        busy = [shard for shard in range(len(run.plan.shards)) if _unfinished(run, shard, elsewhere)[1]]
        if busy:
            raise _at_work(run, busy, elsewhere)
        core.delete_files(run.uri, files[:-1], [SHARDS], run.storage_options)
        core.delete_files(run.uri, files[-1:], [""], run.storage_options)
    return [Leftover("run", shown_uri(run.uri), len(files))]
