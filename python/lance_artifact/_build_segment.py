"""`build_segment`: a segment that is not committed, for pylance's own ways to merge and commit segments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lance.dataset import Index

from . import _lance_artifact as core
from ._arguments import (
    Progress,
    StorageOptions,
    fragment_list,
    index_type_name,
    metric_name,
)
from ._artifacts import common_version, open_artifacts
from ._calls import awaited
from ._checked import checked
from ._commit import attempt_of, provenance
from ._dataset import Handle, vector_column
from ._lance_artifact import Artifact, IvfPqModel
from ._log import stage
from ._process import terminable
from ._progress import reporter
from ._wanted import default_name

if TYPE_CHECKING:
    import lance


@terminable()
@awaited
@checked
def build_segment(
    dataset: lance.LanceDataset | str | Path,
    column: str,
    artifacts: Artifact | str | Path | Iterable[Artifact | str | Path],
    *,
    model: IvfPqModel | None = None,
    name: str | None = None,
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
) -> Index:
    """Make the files of an index segment and leave its commit to the caller: what pylance's ``create_index_uncommitted`` returns.

    All that `finalize` checks before its commit is checked; what it checks at its commit is not: Lance commits a segment whose fragments
    were rewritten meanwhile with less coverage, or none, without a word. `finalize` is the safer way where it does.

    Parameters
    ----------
    dataset, column, artifacts, model, index_type, metric, fragment_ids, m, ef_construction, max_level, storage_options, sync, memory_limit, progress
        As in `finalize`.
    name : str, optional
        Of the index that it will belong to. Default as in `finalize`; what is committed is named by ``commit_existing_index_segments``.
    skip_transpose : bool, default False
        Codes row by row, the form that ``merge_existing_index_segments`` takes. Searches are faster without.
    index_uuid : str, optional
        Of the segment; default a new one. Two builds at once must not have the same.

    Returns
    -------
    lance.dataset.Index
        For ``dataset.commit_existing_index_segments(name, column, [index, ...])``, alone or with others over other fragments, and with
        skip_transpose for ``dataset.merge_existing_index_segments([index, ...])``. Files that are never committed are left to
        ``cleanup_old_versions``, which takes them after seven days.

    Raises
    ------
    As `finalize`, but for its commit.
    """
    handle = Handle.of(dataset)
    path, _ = vector_column(handle, column)
    index_type = index_type_name(index_type)
    ids = fragment_list(fragment_ids)
    opened = open_artifacts(handle, artifacts, storage_options)
    at = handle.at(common_version(handle, opened))
    name = name or default_name(handle, path)
    built_path = at.path_of(handle.field_id(path), path)
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
                built_path,
                opened,
                attempt.uuid,
                model=model,
                metric=None if metric is None else metric_name(metric),
                index_type=index_type,
                m=m,
                ef_construction=ef_construction,
                max_level=max_level,
                fragment_ids=ids,
                hints=provenance(backend_name),
                skip_transpose=skip_transpose,
                sync=sync,
                memory_limit=memory_limit,
                progress=reporter(progress),
            )
            told["rows"] = segment.num_rows
        segment.release(at.core)
        return index_of(segment, name)


def index_of(segment: core._Segment, name: str) -> Index:
    """A segment as pylance describes one that is not committed."""
    fragments: Any = set(segment.fragment_ids)  # pylance turns a set into its bitmap
    return Index(
        uuid=segment.uuid,
        name=name,
        fields=[segment.field_id],
        dataset_version=segment.dataset_version,
        fragment_ids=fragments,
        index_version=segment.index_version,
        index_details=cast(Any, segment.details),
    )
