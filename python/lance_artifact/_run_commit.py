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
from ._lance_artifact import Artifact, IvfPqModel
from ._log import stage
from ._progress import reporter
from ._run_files import COMMITTED, HINT
from ._wanted import Wanted, check_latest
from .exceptions import ArtifactMismatchError, InvalidInputError

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
    path = at.path_of(plan.field_id, plan.column)
    wanted = Wanted(
        plan.name,
        plan.mode,
        plan.field_id,
        path,
        plan.index_type,
        model.metric,
        model.fingerprint,
        run_id=run.run_id,
    )
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


def is_committed(run: Run, handle: Handle) -> bool:
    """Whether the index of a run is there: as it was committed, or as what was made of that since."""
    found = core.segments_with(Handle.of(handle.latest()).core, run.plan.name, run.run_id)
    if found:
        write_down(run, found[0], int(handle.latest().version))
        return True
    if run.committed() is None:
        return False
    latest = Handle.of(handle.latest())
    model = run.model()
    there = [index for index in latest.dataset.describe_indices() if index.name == run.plan.name]
    if model is None or not there or there[0].index_type != run.plan.index_type:
        return False
    # Extended or merged since, it is of the same model; anything else of that name is somebody else's.
    try:
        return bool(
            model_of(latest, CommittedIndex.of(latest, run.plan.name)).fingerprint == model.fingerprint
        )
    except (InvalidInputError, ArtifactMismatchError):
        return False


def write_down(run: Run, segment: str, version: int) -> None:
    content = json.dumps({"segment": segment, "version": version}).encode()
    # It is committed: what cancels the call comes too late.
    with shielded():
        core.put_new(run.uri, COMMITTED, content, run.storage_options)
