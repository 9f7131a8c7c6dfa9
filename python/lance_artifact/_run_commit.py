"""The commit of a run's index, which happens once, whoever finalizes it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from . import _lance_artifact as core
from ._arguments import Progress
from ._cancel import shielded
from ._commit import attempt_of, commit_segment, provenance
from ._dataset import Handle
from ._index import CommittedIndex, model_of
from ._lance_artifact import Artifact, IvfPqModel, shown_uri
from ._log import stage
from ._progress import reporter
from ._run_files import COMMITTED, HINT
from ._wanted import Known, Wanted, check_latest, few, same_name
from .exceptions import ArtifactMismatchError, CommitConflictError, InvalidInputError

if TYPE_CHECKING:
    from ._run import Run


def build_and_commit(
    run: Run,
    handle: Handle,
    at: Handle,
    model: IvfPqModel,
    artifacts: list[Artifact],
    *,
    sync: bool,
    memory_limit: int | None,
    progress: Progress,
) -> str:
    plan = run.plan
    wanted = _wanted(run, at, model)
    path = wanted.path
    check_latest(handle, at, wanted, plan.fragment_ids)
    with attempt_of(handle, at) as attempt:
        with stage(
            "built",
            "building an {index_type} segment of {artifacts} artifacts",
            "built a segment of {rows} rows in {seconds:.2f} s",
            index_type=plan.index_type,
            artifacts=len(artifacts),
        ) as told:
            segment = core.build_segment(
                at.core,
                path,
                artifacts,
                attempt.uuid,
                model=model,
                index_type=plan.index_type,
                m=plan.m,
                ef_construction=plan.ef_construction,
                max_level=plan.max_level,
                skip_transpose=plan.skip_transpose,
                fragment_ids=None if all(a._source is not None for a in artifacts) else plan.fragment_ids,
                hints={**provenance(plan.backend), HINT: run.run_id},
                sync=sync,
                memory_limit=memory_limit,
                progress=reporter(progress),
            )
            told["rows"] = segment.num_rows
        commit_segment(attempt, wanted, segment)
    return attempt.uuid


def _wanted(run: Run, at: Handle, model: IvfPqModel | None) -> Wanted:
    plan = run.plan
    return Wanted(
        plan.name,
        plan.mode,
        plan.field_id,
        at.path_of(plan.field_id, plan.column),
        plan.index_type,
        plan.metric if model is None else model.metric,
        model and model.fingerprint,
        run_id=run.run_id,
        known=_appended_to(run, at),
    )


def check_uncommitted(run: Run, handle: Handle, model: IvfPqModel | None = None) -> None:
    """Whether the index of a run that is not committed can still be: others may have built one of that name since it was planned.

    Raises
    ------
    As `check_name`: what the commit would refuse after the work is refused before it.
    """
    at, model = run.dataset(handle.dataset), run.model() or model
    # Until it is published only the caller has a model of his own: without it, it is compared at the commit.
    trains = model is None and run.plan.model is None
    check_latest(handle, at, _wanted(run, at, model), run.plan.fragment_ids, trains=trains)


def _appended_to(run: Run, at: Handle) -> Known | None:
    """The index to which a run appends. One that was there when it was planned, and was dropped since, is not brought back in part."""
    if run.plan.mode != "append":
        return None
    segments = [str(s.uuid) for index in same_name(at.dataset, run.plan.name) for s in index.segments]
    return Known(frozenset(segments)) if segments else None


def is_committed(run: Run, handle: Handle) -> bool:
    """Whether the index of a run is there: as it was committed, or as what was made of that since.

    Raises
    ------
    CommitConflictError
        That cannot be told.
    """
    plan = run.plan
    latest = Handle.of(handle.latest())
    found = core.segments_with(latest.core, plan.name, run.run_id)
    if found:
        write_down(run, found[0], latest.version)
        return True
    if run.committed() is None:
        return False
    model = run.model()
    if model is None or not same_name(latest.dataset, plan.name):
        return False
    # Extended or merged since, it is of the same model; anything else of that name is somebody else's.
    try:
        index = CommittedIndex.of(latest, plan.name)
        if (index.index_type, index.field_id) != (plan.index_type, plan.field_id):
            return False
        if model_of(latest, index).fingerprint != model.fingerprint:
            return False
    except (InvalidInputError, ArtifactMismatchError):
        return False
    return _covers(run, latest, index)


def _covers(run: Run, latest: Handle, index: CommittedIndex) -> bool:
    """Whether an index of a run's model is of all of its rows: somebody may have dropped the run's own, and built another of less."""
    there, planned = set(latest.fragment_ids()), set(run.plan.fragment_ids)
    scanned = there - index.covered()
    if scanned & planned:
        return False
    if not scanned or planned <= there:
        return True
    # A compaction puts rows that are indexed into fragments that are; those of an index that was dropped may be in any.
    raise CommitConflictError(
        f"index {index.name!r}: it cannot be told whether it has all rows of the run at {shown_uri(run.uri)}, which was committed once: fragments "
        f"{few(planned - there)} of the run were rewritten or emptied since, and fragments {few(scanned)} have no index now; call "
        f"extend_index(dataset, {index.name!r}), or drop the index and build it anew in another folder"
    )


def write_down(run: Run, segment: str, version: int) -> None:
    content = json.dumps({"segment": segment, "version": version}).encode()
    # It is committed: what cancels the call comes too late.
    with shielded():
        core.put_new(run.uri, COMMITTED, content, run.storage_options)
