"""`finalize`: artifacts in, a committed index out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import _lance_artifact as core
from ._arguments import (
    Progress,
    StorageOptions,
    fragment_list,
    index_mode,
    index_type_name,
    metric_name,
)
from ._artifacts import common_version, covered, open_artifacts
from ._calls import awaited
from ._checked import checked
from ._codebook_rate import said_of_codebook
from ._commit import attempt_of, commit_segment, provenance
from ._dataset import Handle, vector_column
from ._lance_artifact import Artifact, IvfPqModel
from ._log import stage
from ._process import terminable
from ._progress import reporter
from ._wanted import Wanted, check_latest, default_name

if TYPE_CHECKING:
    import lance


@terminable()
@awaited
@checked
def finalize(
    dataset: lance.LanceDataset | str | Path,
    column: str,
    artifacts: Artifact | str | Path | Iterable[Artifact | str | Path],
    *,
    model: IvfPqModel | None = None,
    name: str | None = None,
    replace: bool = False,
    mode: str | None = None,
    index_type: str = "IVF_PQ",
    metric: str | None = None,
    fragment_ids: Sequence[int] | None = None,
    m: int = 20,
    ef_construction: int = 150,
    max_level: int = 7,
    skip_transpose: bool = False,
    index_uuid: str | None = None,
    storage_options: StorageOptions | None = None,
    sync: bool = False,
    memory_limit: int | None = None,
    progress: Progress = False,
    backend_name: str | None = None,
) -> lance.LanceDataset:
    """Make a Lance index of artifacts and commit it through the dataset's handle, which sees it afterwards.

    The index is built from the version (and branch) the rows were encoded from, and committed on top of the latest one: appends,
    deletes and updates since do no harm, after a compaction, an overwrite or a change of the column it is refused. The rows of the
    artifacts must be the live rows of the fragments covered, each once; those that are missing must have been counted as
    dropped, or have vectors that Lance does not index. A failure leaves no files behind and the previous index in place, with two
    exceptions that its message names: a commit that could not be taken back, and one that a store may still carry out, whose files stay.
    A Ctrl-C during the commit is raised when the commit's answer is there, or after ten seconds without one.

    Parameters
    ----------
    dataset : lance.LanceDataset, LanceDB table, or path
    column : str
    artifacts : Artifact, path, URI, or several of them
        Encoded with one model from fragments that do not overlap.
    model : IvfPqModel, optional
        Needed where the artifacts hold none; must match otherwise.
    name : str, optional
        Default as in pylance: ``f"{column}_idx"``, and with ``_2``, ``_3`` and so on where an index of another column has that name.
    replace : bool, default False
        As ``mode="replace"``.
    mode : {"create", "replace", "append"}, default "create"
        What becomes of an index of that name. "create": it is an error. "replace": its segments over the same fragments are
        replaced, those over others stay; where it covers only others, that is an error. "append": nothing is replaced, and the fragments
        must be others than those it covers. What stays must be of the same type, metric and model.
    index_type : {"IVF_PQ", "IVF_HNSW_PQ"}
    metric : str, optional
        Must match the model's.
    fragment_ids : sequence of int, optional
        The fragments the index covers. Needed where an artifact does not say which it was encoded from (it was written without
        ``source=``); those that say it must say the same.
    m, ef_construction, max_level : int, default 20, 150 and 7
        Of the HNSW graphs of IVF_HNSW_PQ.
    skip_transpose, index_uuid
        As in `build_segment`.
    storage_options : dict, or callable that gives one, optional
        For artifacts given by URI; as in `build_artifact`.
    sync : bool, default False
        Wait until the index's files are on the local disk before they are committed. Lance itself leaves that to the system.
    memory_limit : int, optional
        Bytes that the call may hold, beside what the process had before; default half of the memory that this machine, or its
        container, has free. An IVF_HNSW_PQ index is made by Lance, whose builder takes 512 MiB and its largest partition with its
        graph: a limit below that is refused.
    progress : bool or callable, default False
    backend_name : str, optional
        Recorded in the index details.

    Returns
    -------
    lance.LanceDataset
        The handle given (or one opened from the path), at the version that has the index.

    Raises
    ------
    ArtifactMismatchError
        Artifacts, model, column, dataset or fragments do not fit each other.
    CorruptArtifactError
        An artifact breaks a promise of its manifest.
    CommitConflictError
        The dataset moved on in a way that the index cannot follow, or its coverage would be smaller than intended.
    IndexExistsError
        There is an index of that name and replace is False.
    """
    handle = Handle.of(dataset, commits=True)
    path, _ = vector_column(handle, column)
    index_type = index_type_name(index_type)
    name = name or default_name(handle, path)
    ids = fragment_list(fragment_ids)
    opened = open_artifacts(handle, artifacts, storage_options)
    at = handle.at(common_version(handle, opened))
    models = [m for m in (model, *(a.model for a in opened)) if m is not None]
    wanted = Wanted(
        name,
        index_mode(replace, mode),
        handle.field_id(path),
        path,
        index_type,
        models[0].metric if models else None,
        models[0].fingerprint if models else None,
    )
    path = at.path_of(wanted.field_id, path)
    check_latest(handle, at, wanted, covered(at, opened, ids))
    with attempt_of(handle, at, index_uuid) as attempt:
        with stage(
            "built",
            "building an {index_type} segment of {artifacts} artifacts",
            "built a segment of {rows} rows in {seconds:.2f} s",
            index_type=index_type,
            artifacts=len(opened),
        ) as told:
            segment = core.build_segment(
                at.core,
                path,
                opened,
                attempt.uuid,
                model=model,
                metric=None if metric is None else metric_name(metric),
                index_type=index_type,
                m=m,
                ef_construction=ef_construction,
                max_level=max_level,
                skip_transpose=skip_transpose,
                fragment_ids=ids,
                hints={**provenance(backend_name), **said_of_codebook()},
                sync=sync,
                memory_limit=memory_limit,
                progress=reporter(progress),
            )
            told["rows"] = segment.num_rows
        commit_segment(attempt, wanted, segment)
    return handle.user
