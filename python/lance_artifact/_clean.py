"""`clean_run`: what a run and builds that were killed left, listed or removed; nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import _lance_artifact as core
from ._arguments import StorageOptions
from ._calls import awaited
from ._checked import checked
from ._dataset import Handle
from ._lance_artifact import Artifact
from ._log import LOGGER
from ._process import terminable
from ._run import Run
from ._run_files import COMMITTED, MODEL, PLAN, SHARDS
from ._uploads import OpenUploads
from .exceptions import ArtifactNotFoundError, CommitConflictError, LanceArtifactError

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
        Also the run itself: its artifacts, model and plan. An index that was committed stays.
    dry_run : bool, default False
        Only list.

    Returns
    -------
    list of Leftover
        What was, or would be, removed.

    Raises
    ------
    CommitConflictError
        ``everything``, and a process is at work on a shard.
    """
    run = Run.open(uri, storage_options=storage_options, dataset_storage_options=dataset_storage_options)
    return [
        *_shards(run, everything, dry_run),
        *_segments(run, dataset, dry_run),
        *_run(run, everything, dry_run),
    ]


def discard_run(run: Run, dataset: Any) -> None:
    """Remove a run whose index is committed. The index stands either way."""
    try:
        clean_run(run.uri, dataset, everything=True, storage_options=run.storage_options)
    except LanceArtifactError as error:
        LOGGER.warning(
            "the index is committed; its run %s could not be removed, and clean_run removes it: %s",
            run.uri,
            error,
        )


def _shards(run: Run, everything: bool, dry_run: bool) -> list[Leftover]:
    looked = [
        core.unfinished_files(run.shard_uri(shard), run.storage_options, everything)
        for shard in range(len(run.plan.shards))
    ]
    busy = [shard for shard, (_, is_busy) in enumerate(looked) if is_busy]
    if everything and busy:
        raise CommitConflictError(f"{run.uri}: a process is at work on shards {busy[:10]}; stop it first")
    uploads = OpenUploads(run.uri, run.storage_options)
    found: list[Leftover] = []
    for shard, (files, is_busy) in enumerate(looked):
        place = run.shard_uri(shard)
        # Before the claims go, by which it is known that nobody is at work.
        if not is_busy:
            found += _uploads(uploads, f"{SHARDS}/{shard:05}", dry_run)
        if files:
            found.append(Leftover("attempt", place, len(files)))
            if not dry_run:
                core.delete_unfinished(place, run.storage_options, everything)
        if not everything:
            continue
        try:
            artifact = Artifact.open(place, run.storage_options)
        except ArtifactNotFoundError:
            continue
        found.append(Leftover("artifact", place, len(artifact.manifest.get("files", ())) + 1))
        if not dry_run:
            core.delete_artifact(place, run.storage_options)
    return found


def _uploads(uploads: OpenUploads, folder: str, dry_run: bool) -> list[Leftover]:
    found = []
    for uri, upload in list(uploads.below(folder)):
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
        found += _uploads(uploads, f"_indices/{uuid}", dry_run)
        found.append(Leftover("segment", f"{latest.uri}/_indices/{uuid}", 1))
        if not dry_run:
            core.discard_segment(latest.core, uuid)
    return found


def _run(run: Run, everything: bool, dry_run: bool) -> list[Leftover]:
    """The plan goes last, so that what is left at any moment is still known to be a run."""
    if not everything:
        return []
    there = [name for name, size, _ in core.list_folder(run.uri, "", run.storage_options) if size is not None]
    # A process that was killed while it wrote one of them has left it under such a name.
    unfinished = sorted(name for name in there if name.startswith(UNFINISHED))
    files = unfinished + [name for name in (MODEL, COMMITTED, PLAN) if name in there]
    if not dry_run:
        core.delete_files(run.uri, files[:-1], [SHARDS], run.storage_options)
        core.delete_files(run.uri, files[-1:], [""], run.storage_options)
    return [Leftover("run", run.uri, len(files))]
