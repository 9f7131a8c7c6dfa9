"""`extend_index`: a segment over what an index does not cover yet, with the index's own model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import _lance_artifact as core
from ._arguments import Progress, StorageOptions, fragment_list
from ._artifacts import check_place, store_options
from ._assign import check_assign
from ._build_artifact import build_artifact
from ._calls import awaited
from ._checked import checked
from ._codebook_rate import said_of_codebook
from ._commit import attempt_of, commit_segment, provenance
from ._dataset import Handle
from ._fit import ModelFit, errors, skew
from ._index import CommittedIndex, model_of, segments_now
from ._lance_artifact import CpuEncoder, IvfPqModel
from ._log import LOGGER, log
from ._process import temporary_artifact, terminable
from ._progress import reporter
from ._wanted import Known, Wanted, check_name
from .backends import Backend, resolve_backend
from .exceptions import InvalidInputError, LanceArtifactError

if TYPE_CHECKING:
    import lance


@dataclass(frozen=True)
class Extension:
    """What `extend_index` did.

    Attributes
    ----------
    name : str
    segment : str or None
        UUID of the new segment; None where there was nothing to index.
    fragment_ids : tuple of int
        The fragments it covers.
    num_rows : int
        Rows indexed.
    rows_dropped : mapping of str to int
        Rows without a usable vector, by reason.
    num_segments : int
        Of the index now. Each one costs every search a little: `merge_segments` puts them together.
    fit : ModelFit or None
        How well the model fits the new rows. None where there were none, or it was not asked for.
    """

    name: str
    segment: str | None
    fragment_ids: tuple[int, ...]
    num_rows: int
    rows_dropped: Mapping[str, int]
    num_segments: int
    fit: ModelFit | None

    def __str__(self) -> str:
        if self.segment is None:
            return f"index {self.name!r} covers every fragment; nothing was done"
        dropped = sum(self.rows_dropped.values())
        text = (
            f"index {self.name!r}: {self.num_rows:,} rows of {len(self.fragment_ids)} fragments indexed"
            f"{f', {dropped:,} dropped {dict(self.rows_dropped)}' if dropped else ''}; {self.num_segments} segments"
        )
        return f"{text}; {self.fit}" if self.fit else text


@terminable()
@awaited
@checked
def extend_index(
    dataset: lance.LanceDataset | str | Path,
    name: str,
    *,
    fragment_ids: Sequence[int] | None = None,
    backend: str | Backend = "auto",
    devices: Sequence[int] | None = None,
    device_memory_limit: int | None = None,
    assign: str = "exact",
    artifact_uri: str | Path | None = None,
    memory_limit: int | None = None,
    storage_options: StorageOptions | None = None,
    sync: bool = False,
    measure_fit: bool = True,
    progress: Progress = False,
) -> Extension:
    """Index the rows that came since an index was built, and commit them as one more segment of it.

    Reads the model from the index, whoever built it, and encodes only fragments that the index does not cover, at the latest version of
    the dataset. What is there already is neither read nor written: the cost is that of the new rows.

    Parameters
    ----------
    dataset : lance.LanceDataset, LanceDB table, or path
        Its handle sees the new segment afterwards.
    name : str
        Of an IVF_PQ or IVF_HNSW_PQ index of any metric.
    fragment_ids : sequence of int, optional
        Of the fragments that are not covered only these.
    backend, devices, device_memory_limit, assign, memory_limit, sync, progress
        As in `create_index`.
    artifact_uri : str or path, optional
        Where the encoded rows are laid out, and kept. Default: a temporary folder, removed at the end.
    storage_options : dict, or callable that gives one, optional
        Of the artifact; as in `build_artifact`.
    measure_fit : bool, default True
        Compare samples of 4,096 old and new rows with what their codes stand for; see `ModelFit`.

    Returns
    -------
    Extension

    Raises
    ------
    InvalidInputError
        There is no such index, it is of another type, or fragments are covered already.
    CommitConflictError
        The fragments were rewritten, or indexed by somebody else, meanwhile, or the index was dropped or built anew. Nothing is left behind.
    ArtifactMismatchError
        The index has segments of different models.
    See also `build_artifact`.
    """
    handle = Handle.of(dataset, commits=True)
    at = handle.at(int(handle.latest().version))
    index = CommittedIndex.of(at, name)
    covered = index.covered()
    asked = fragment_list(fragment_ids)
    open_ids = [i for i in at.fragment_ids() if i not in covered]
    if asked is not None:
        wrong = sorted(set(asked) - set(open_ids))
        if wrong:
            raise InvalidInputError(
                f"fragment_ids: fragments {wrong[:10]} are covered by index {name!r} already, or are not in version {at.version}; expected "
                f"some of {open_ids[:10]}"
            )
        open_ids = sorted(set(asked))
    if artifact_uri is not None:
        artifact_uri = check_place(at, artifact_uri)
        storage_options = store_options(at, artifact_uri, storage_options)
    chosen = resolve_backend(backend, devices, device_memory_limit)
    check_assign(assign, chosen)
    model = model_of(at, index)
    if not open_ids or at.count_rows(open_ids) == 0:
        handle.refresh()
        return Extension(name, None, (), 0, {}, len(index.segments), None)
    wanted = Wanted(
        name,
        "append",
        index.field_id,
        index.path,
        index.index_type,
        model.metric,
        model.fingerprint,
        known=Known(frozenset(index.segments)),
    )
    wanted.of_model.update(index.segments)
    check_name(at.dataset, wanted, open_ids, frozenset())
    with temporary_artifact() if artifact_uri is None else nullcontext(artifact_uri) as uri:
        artifact = build_artifact(
            at.dataset,
            index.path,
            model,
            uri,
            backend=chosen,
            assign=assign,
            fragment_ids=open_ids,
            memory_limit=memory_limit,
            storage_options=storage_options,
            sync=artifact_uri is not None,
            progress=progress,
        )
        with attempt_of(handle, at) as attempt:
            segment = core.build_segment(
                at.core,
                index.path,
                [artifact],
                attempt.uuid,
                model=model,
                index_type=index.index_type,
                m=index.m,
                ef_construction=index.ef_construction,
                max_level=index.max_level,
                # A backend that writes its artifact itself may not say what it read: all that it was given.
                fragment_ids=None if "source" in artifact.manifest else open_ids,
                hints={**provenance(chosen.name), **said_of_codebook(index.hints)},
                sync=sync,
                memory_limit=memory_limit,
                progress=reporter(progress),
            )
            commit_segment(attempt, wanted, segment)
        fit = _fit(at, index, model, open_ids, np.array(artifact.partition_sizes())) if measure_fit else None
        if fit is not None and fit.rebuild:
            LOGGER.warning("index %r: a new index pays: %s", name, fit.rebuild)
        if fit is not None:
            log("fit", "{fit}", fit=str(fit), ratio=fit.ratio)
        dropped = artifact.manifest.get("rows", {}).get("dropped", {})
        count = segments_now(handle, name, len(index.segments) + 1)
        return Extension(name, attempt.uuid, tuple(open_ids), segment.num_rows, dropped, count, fit)


def _fit(
    at: Handle, index: CommittedIndex, model: IvfPqModel, new: list[int], new_sizes: np.ndarray
) -> ModelFit | None:
    old = sorted(index.covered())
    if not old:
        return None
    try:
        encoder = CpuEncoder(model)
        before = errors(model, encoder, at.vectors(index.path, old))
        after = errors(model, encoder, at.vectors(index.path, new))
        sizes = np.array(core.partition_sizes(at.core, index.name))
    except LanceArtifactError as error:
        # The index is extended, whatever cannot be said of it.
        LOGGER.warning(
            "index %r is extended; how well its model fits could not be seen: %s", index.name, error
        )
        return None
    if before is None or after is None:
        return None
    return ModelFit(before[0], after[0], before[1], after[1], skew(sizes), skew(sizes + new_sizes))
