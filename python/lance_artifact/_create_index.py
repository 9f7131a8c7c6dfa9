"""`create_index`: train, encode and finalize in one call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace as changed
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import pyarrow as pa

from ._arguments import (
    DEFAULT_BITS,
    IndexParams,
    Progress,
    StorageOptions,
    check_asked,
    check_sub_vectors,
    check_target,
    default_sub_vectors,
    fragment_list,
    given_centroids,
    given_model,
    index_mode,
    index_type_name,
    metric_name,
    one_progress,
    wanted_partitions,
)
from ._artifacts import check_place, discard_artifact, published_artifact, store_options
from ._assign import check_assign
from ._build_artifact import build_artifact
from ._calls import awaited
from ._cancel import poll, shielded
from ._checked import checked
from ._commit import readable_commit
from ._dataset import Handle, vector_column
from ._evaluate import check_recall
from ._finalize import finalize
from ._lance_artifact import IvfPqModel, _VectorSource
from ._log import LOGGER
from ._process import temporary_artifact, terminable
from ._pylance import PylanceArguments, centroids_of_file, check_pylance_arguments, commit_empty_index
from ._resume import create_by_run
from ._run_files import is_run
from ._train import TooFewVectors, train_handle
from ._wanted import Wanted, check_latest, check_name, default_name
from .backends import Backend, resolve_accelerator, resolve_backend
from .exceptions import InvalidInputError

if TYPE_CHECKING:
    import lance
    from lance.progress import IndexProgress


@terminable()
@awaited
@checked
def create_index(
    dataset: lance.LanceDataset | str | Path,
    column: str | list[str],
    index_type: str = "IVF_PQ",
    name: str | None = None,
    metric: str = "L2",
    replace: bool = False,
    num_partitions: int | None = None,
    ivf_centroids: Any = None,
    pq_codebook: Any = None,
    num_sub_vectors: int | None = None,
    *,
    num_bits: int | None = None,
    sample_rate: int = 256,
    max_iters: int = 50,
    seed: int = 0,
    fragment_ids: Sequence[int] | None = None,
    target_partition_size: int | None = None,
    m: int = 20,
    ef_construction: int = 150,
    max_level: int = 7,
    append: bool = False,
    train: bool = True,
    skip_transpose: bool = False,
    index_uuid: str | None = None,
    ivf_centroids_file: str | None = None,
    backend: str | Backend = "auto",
    accelerator: str | None = None,
    devices: Sequence[int] | None = None,
    device_memory_limit: int | None = None,
    assign: str = "exact",
    artifact_uri: str | Path | None = None,
    keep_artifact: bool | None = None,
    resume: bool | None = None,
    num_shards: int | None = None,
    verify: bool = False,
    memory_limit: int | None = None,
    storage_options: StorageOptions | None = None,
    sync: bool = False,
    progress: Progress = False,
    progress_callback: Callable[[IndexProgress], Any] | None = None,
    **pylance: Unpack[PylanceArguments],
) -> lance.LanceDataset:
    """Train, encode and finalize: an IVF_PQ or IVF_HNSW_PQ index of a column, as pylance's create_index makes it.

    Parameters
    ----------
    dataset : lance.LanceDataset, LanceDB table, or path
        A table, also an asynchronous one, sees the index afterwards. A path is opened with storage_options.
    column, index_type, name, metric
        As in pylance.
    replace : bool, default False
        An index of that name is replaced: it may cover no other fragments than those that are built.
    num_partitions : int, optional
        Default as in pylance: rows / target_partition_size, between 1 and 4096. As there, a whole table is never cut in more than
        rows / sample_rate, with a warning; give a lower sample_rate to have more. A float is rounded down.
    ivf_centroids : array (num_partitions, dimension), optional
        Not trained but taken, in the dtype of the column. As nested lists too.
    pq_codebook : array (num_sub_vectors, 2**num_bits, dimension // num_sub_vectors), optional
        Of those centroids, which it needs.
    num_sub_vectors : int, optional
        Default as in LanceDB: dimension / 16, else dimension / 8, where that divides it.
    num_bits : {4, 8}, optional
        Default 8, or the codebook's.
    sample_rate, max_iters, seed, fragment_ids
        As in `train`.
    target_partition_size : int, optional
        Rows of a partition where num_partitions is not given. Default 8192, of IVF_HNSW_PQ 1,048,576.
    m, ef_construction, max_level : int, default 20, 150 and 7
        Of IVF_HNSW_PQ.
    append : bool, default False
        The rows become one more segment of the index of that name, which must not cover their fragments, and whose model (see
        `IvfPqModel.from_index`) ivf_centroids and pq_codebook must be. `extend_index` does that by itself.
    train : bool, default True
        False: commit an index without rows, which ``optimize_indices`` trains when there are vectors enough, as in pylance. That is also
        what becomes of a table with too few vectors for a codebook (``2**num_bits``), with a warning.
    skip_transpose : bool, default False
        As in `build_segment`.
    index_uuid : str, optional
        Of the segment; default a new one.
    ivf_centroids_file : str, optional
        A .npy file of centroids, by path or URI, in place of ivf_centroids.
    backend : str or Backend, default "auto"
        "auto" takes a GPU if there is one, else the CPU.
    accelerator : str, optional
        "cuvs" or "cuvs:N", as in pylance: a GPU, or an error.
    devices : sequence of int, optional
        GPUs of a backend that has them; the first one trains, all encode. Default the first visible one.
    device_memory_limit : int, optional
        Bytes that a GPU backend may take of each device, beside CUDA's own; as in `train` and `build_artifact`. Default what is free.
    assign : {"exact", "fast"}, default "exact"
        As in `build_artifact`: whether a row may be compared with the nearest groups of centroids only.
    artifact_uri : str or path, optional
        Where the encoded rows are laid out (8 + 4 + pq_code_width bytes a row). Default: a folder in the system's temporary
        folder, removed at the end.
    keep_artifact : bool, optional
        Default: kept where artifact_uri is given. After a failed commit a given one is always kept, to finalize again.
    resume : bool, optional
        True: artifact_uri is the folder of a run (see `Run`): the model and the artifacts of shards that are published there are taken,
        what is left is done, and a call that asks for something else is refused with the difference. Killed at any moment, it goes on
        with the same call. Default: as True where a run is there; where a finished artifact is there that was encoded from the same
        rows with the same parameters (but for the seed and the backend, which it does not say), that one is taken. False: anything
        that is there is an error.
    num_shards : int, optional
        Of a run; as in `plan`.
    verify : bool, default False
        Search the index when it is committed: 32 random rows, with every partition probed, against exact search, which reads the column
        once. The recall is logged, and warned of where it is so low that the codes say little of the vectors.
    memory_limit : int, optional
        Bytes that the call may hold, beside what the process had before; default half of the memory that this machine, or its
        container, has free. Samples, batches, the writer and windows of the index share it.
    storage_options : dict, or callable that gives one, optional
        Of the artifact; as in `build_artifact`. Default those of the dataset, where it is in the same store.
    sync : bool, default False
        As in `finalize`.
    progress : bool or callable, default False
        True: a tqdm bar on a terminal. A callable gets `lance.progress.IndexProgress`; what it raises ends the call, and nothing is
        committed. See also `cancel_on`.
    progress_callback : callable, optional
        As a callable progress, by pylance's name for it.
    **pylance
        pylance's index_cache_size, shuffle_partition_batches, shuffle_partition_concurrency and filter_nan, which tune Lance's own builder
        and have no effect here, and index_file_version, which is "V3". Its precomputed_partition_dataset and streaming_* are refused.

    Returns
    -------
    lance.LanceDataset
        The handle given, which sees the new index; of a table or a path one of the same dataset.

    Raises
    ------
    InvalidInputError, InvalidTypeError, UnsupportedError, ColumnNotFoundError, ColumnTypeError
        An argument, or the column, cannot be used; nothing was read.
    IndexExistsError
        There is an index of that name, and neither replace nor append was asked for.
    BackendUnavailableError
        The backend that was named cannot run here.
    CancelledError
        See `cancel_on`.
    See also `train`, `build_artifact` and `finalize`.
    """
    check_pylance_arguments(pylance, _NAMED)
    progress = one_progress(progress, progress_callback)
    handle = Handle.of(dataset, commits=True)
    path, dimension = vector_column(handle, column)
    asked = IndexParams(
        index_type_name(index_type),
        metric_name(metric),
        num_partitions,
        num_sub_vectors,
        num_bits,
        sample_rate,
        max_iters,
        seed,
        target_partition_size,
        m,
        ef_construction,
        max_level,
        skip_transpose,
        assign,
    )
    asked.check()
    ids = fragment_list(fragment_ids)
    if accelerator is not None:
        if backend != "auto":
            raise InvalidInputError(
                f"accelerator: got {accelerator!r} beside backend={backend!r}; pass one of them"
            )
        backend = resolve_accelerator(accelerator, devices, device_memory_limit)
        devices = device_memory_limit = None
    source = handle.vectors(path, ids)
    centroids, model = _given(asked, source, ivf_centroids, ivf_centroids_file, pq_codebook)
    # A run compares what callers said.
    said = asked
    if model is not None:
        asked = changed(asked, num_sub_vectors=model.num_sub_vectors, num_bits=model.num_bits)
    else:
        bits = DEFAULT_BITS if num_bits is None else num_bits
        parts = default_sub_vectors(dimension, bits)[0] if num_sub_vectors is None else num_sub_vectors
        asked = changed(asked, num_sub_vectors=parts, num_bits=bits)
    codes = 2 ** cast(int, asked.num_bits)
    check_sub_vectors(dimension, cast(int, asked.num_sub_vectors), cast(int, asked.num_bits))
    if artifact_uri is not None:
        artifact_uri = check_place(handle, artifact_uri)
        storage_options = store_options(handle, artifact_uri, storage_options)
    elif resume or num_shards:
        raise InvalidInputError("resume and num_shards: are of a run, which needs artifact_uri, its folder")
    elif keep_artifact:
        raise InvalidInputError("keep_artifact: got True without artifact_uri; say where to keep it")
    wanted = Wanted(
        name or default_name(handle, path),
        index_mode(replace, "append" if append else None),
        handle.field_id(path),
        path,
        asked.index_type,
        asked.metric,
        model and model.fingerprint,
    )
    if not train:
        given = {"fragment_ids": ids, "artifact_uri": artifact_uri, "index_uuid": index_uuid}
        for what in (what for what, value in given.items() if value is not None):
            raise InvalidInputError(
                f"{what}: has no meaning with train=False, which makes an index without rows"
            )
        return _commit_empty(handle, wanted, asked)
    by_run = artifact_uri is not None and (
        resume or (resume is None and is_run(artifact_uri, storage_options))
    )
    for what, value in (("num_shards", num_shards),) if not by_run else (("index_uuid", index_uuid),):
        if value is not None:
            raise InvalidInputError(
                f"{what}: is {'not ' if by_run else ''}of a run{'' if by_run else ', which needs resume=True'}"
            )
    chosen = resolve_backend(backend, devices, device_memory_limit)
    check_assign(assign, chosen)
    # Fewer rows than codewords: known without a look at a vector.
    if model is None and ids is None and not by_run and source.count_rows() < codes:
        return _commit_empty(handle, wanted, asked, source.count_rows())
    work: dict[str, Any] = {"memory_limit": memory_limit, "progress": progress}
    if by_run:
        create_by_run(
            handle,
            wanted,
            str(artifact_uri),
            storage_options,
            said,
            name=name,
            fragment_ids=ids,
            num_shards=num_shards,
            model=model,
            ivf_centroids=centroids,
            backend=chosen,
            keep=keep_artifact is not False,
            sync=sync,
            **work,
        )
    else:
        try:
            _create(
                handle,
                wanted,
                asked,
                source,
                ids,
                model=model,
                centroids=centroids,
                chosen=chosen,
                artifact_uri=artifact_uri,
                keep=keep_artifact is not False,
                looks=resume is None,
                index_uuid=index_uuid,
                storage_options=storage_options,
                sync=sync,
                **work,
            )
        except TooFewVectors as error:
            if ids is not None:
                raise InvalidInputError(str(error)) from None
            return _commit_empty(handle, wanted, asked, error.found)
    if verify:
        # It is committed: what ends now does not undo that.
        with shielded():
            check_recall(handle.user, wanted.name)
    return handle.user


_NAMED = tuple(inspect.signature(create_index).parameters)[:-1]


def _given(
    asked: IndexParams,
    source: _VectorSource,
    ivf_centroids: Any,
    ivf_centroids_file: str | None,
    pq_codebook: Any,
) -> tuple[pa.FixedSizeListArray | None, IvfPqModel | None]:
    """The caller's own centroids, or a whole model."""
    if ivf_centroids_file is not None:
        if ivf_centroids is not None:
            raise InvalidInputError(
                "ivf_centroids and ivf_centroids_file cannot be provided at the same time"
            )
        ivf_centroids = centroids_of_file(ivf_centroids_file)
    if pq_codebook is not None and ivf_centroids is None:
        raise InvalidInputError("ivf_centroids must be specified when pq_codebook is provided")
    if ivf_centroids is None:
        return None, None
    centroids = given_centroids(ivf_centroids, source.dtype)
    if asked.num_partitions not in (None, len(centroids)):
        raise InvalidInputError(
            f"Ivf centroids has {len(centroids)} clusters, but num_partitions={asked.num_partitions}"
        )
    if pq_codebook is None:
        return centroids, None
    model = given_model(centroids, pq_codebook, asked.metric, asked.num_sub_vectors, source.dtype)
    check_asked(model, asked.num_partitions, asked.num_sub_vectors, asked.num_bits)
    return None, model.with_training(
        target_partition_size=asked.target_partition_size,
        sample_rate=asked.sample_rate,
        max_iters=asked.max_iters,
    )


def _create(
    handle: Handle,
    wanted: Wanted,
    asked: IndexParams,
    source: _VectorSource,
    ids: list[int] | None,
    *,
    model: IvfPqModel | None,
    centroids: pa.FixedSizeListArray | None,
    chosen: Backend,
    artifact_uri: str | Path | None,
    keep: bool,
    looks: bool,
    index_uuid: str | None,
    storage_options: Any,
    sync: bool,
    memory_limit: int | None,
    progress: Progress,
) -> None:
    """Train, encode and finalize, unless an artifact of the same is there (``looks``)."""
    fragments = ids or handle.fragment_ids()
    may_be_there = artifact_uri is not None and looks
    check_latest(handle, handle, wanted, fragments, trains=model is None and not may_be_there)
    partitions = wanted_partitions(
        asked.num_partitions,
        centroids if model is None else model.ivf_centroids,
        source.count_rows(),
        asked.target_partition_size,
        asked.sample_rate,
        asked.index_type,
        ids is None,
    )
    artifact = None
    if may_be_there:
        artifact = published_artifact(
            source, str(artifact_uri), storage_options, asked, partitions, model, centroids
        )
        if artifact is None and model is None:
            check_latest(handle, handle, wanted, fragments, trains=True)
    if artifact is None:
        bits = cast(int, asked.num_bits)
        width = cast(int, asked.num_sub_vectors) * bits // 8
        check_target(source, artifact_uri, partitions, width, bits, memory_limit, storage_options)
    if artifact is None and artifact_uri is not None and hasattr(chosen, "check_target"):
        chosen.check_target(artifact_uri)
    if artifact is None and model is None:
        params = asked.training(partitions, centroids)
        model = train_handle(
            handle, wanted.path, params, ids, asked.target_partition_size, chosen, memory_limit, progress
        )
    with nullcontext(artifact_uri) if artifact_uri is not None else temporary_artifact() as place:
        if artifact is None:
            artifact = build_artifact(
                handle.dataset,
                wanted.path,
                cast(IvfPqModel, model),
                place,
                backend=chosen,
                assign=asked.assign,
                fragment_ids=ids,
                storage_options=storage_options,
                # What is removed in a moment need not survive a crash of the machine.
                sync=artifact_uri is not None,
                memory_limit=memory_limit,
                progress=progress,
            )
        finalize(
            handle.dataset,
            wanted.path,
            artifact,
            name=wanted.name,
            mode=wanted.mode,
            index_type=asked.index_type,
            m=asked.m,
            ef_construction=asked.ef_construction,
            max_level=asked.max_level,
            skip_transpose=asked.skip_transpose,
            index_uuid=index_uuid,
            # A backend that writes its artifact itself may not say what it read: all that it was given.
            fragment_ids=None if "source" in artifact.manifest else ids or handle.fragment_ids(),
            sync=sync,
            backend_name=chosen.name,
            memory_limit=memory_limit,
            progress=progress,
        )
        handle.refresh()
        if artifact_uri is not None and not keep:
            discard_artifact(artifact, str(artifact_uri), storage_options)


def _commit_empty(
    handle: Handle, wanted: Wanted, asked: IndexParams, found: int | None = None
) -> lance.LanceDataset:
    """An index without rows: as asked, or because only so many vectors were found."""
    if wanted.mode == "append":
        raise InvalidInputError("append: an index without rows is no segment of another; leave it out")
    check_name(handle.latest(), wanted, handle.fragment_ids(), frozenset())
    poll()
    # At the version that was looked at, so that Lance finds an index that came since to be a conflict.
    with readable_commit(wanted.name, handle):
        commit_empty_index(
            copy.copy(handle.dataset),
            wanted.path,
            asked.index_type,
            wanted.name,
            wanted.mode == "replace",
            **asked.of_stock(),
        )
    handle.refresh()
    if found is not None:
        LOGGER.warning(
            "index %r is committed without rows: %d vectors, and a codebook needs %d; optimize_indices() trains it when there are "
            "enough%s",
            wanted.name,
            found,
            2 ** cast(int, asked.num_bits),
            "" if asked.num_bits == 4 else ", or num_bits=4 takes 16",
        )
    return handle.user
