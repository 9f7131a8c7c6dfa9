"""`create_index`: train, encode and finalize in one call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._arguments import (
    Progress,
    StorageOptions,
    check_hnsw,
    check_sub_vectors,
    check_target,
    fragment_list,
    given_model,
    index_type_name,
    metric_name,
    wanted_partitions,
    whole_number,
)
from ._artifacts import check_place, discard_artifact, store_options
from ._build_artifact import build_artifact
from ._calls import awaited
from ._checked import checked
from ._commit import Wanted, check_name
from ._dataset import Handle, vector_column
from ._finalize import finalize
from ._process import temporary_artifact, terminable
from ._train import train
from .backends import Backend, resolve_backend
from .exceptions import InvalidInputError

if TYPE_CHECKING:
    import lance


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
    num_bits: int = 8,
    sample_rate: int = 256,
    max_iters: int = 50,
    seed: int = 0,
    fragment_ids: Sequence[int] | None = None,
    target_partition_size: int | None = None,
    m: int = 20,
    ef_construction: int = 150,
    backend: str | Backend = "auto",
    devices: Sequence[int] | None = None,
    artifact_uri: str | Path | None = None,
    keep_artifact: bool | None = None,
    memory_limit: int | None = None,
    storage_options: StorageOptions | None = None,
    sync: bool = False,
    progress: Progress = False,
) -> lance.LanceDataset:
    """Train, encode and finalize: an IVF_PQ or IVF_HNSW_PQ index of a column, as pylance's create_index makes it.

    Parameters
    ----------
    dataset : lance.LanceDataset, LanceDB table, or path
    column, index_type, name, metric, replace, num_partitions, ivf_centroids, pq_codebook, num_sub_vectors
        As in pylance. ``num_partitions`` may be a whole float. A codebook needs centroids.
    num_bits, sample_rate, max_iters, seed, fragment_ids, target_partition_size
        As in `train`.
    m, ef_construction : int, default 20 and 150
        Of IVF_HNSW_PQ.
    backend : str or Backend, default "auto"
        "auto" takes a GPU if there is one, else the CPU.
    devices : sequence of int, optional
        GPUs of a backend that has them; the first one trains, all encode. Default the first visible one.
    artifact_uri : str or path, optional
        Where the encoded rows are laid out (8 + 4 + pq_code_width bytes a row). Default: a folder in the system's temporary
        folder, removed at the end.
    keep_artifact : bool, optional
        Default: kept where artifact_uri is given. After a failed commit a given one is always kept, to finalize again.
    memory_limit : int, optional
        Bytes that the call may hold, beside what the process had before; default half of the memory that this machine, or its
        container, has free. Samples, batches, the writer and windows of the index share it.
    storage_options : dict, or callable that gives one, optional
        Of the artifact; as in `build_artifact`.
    sync : bool, default False
        As in `finalize`.
    progress : bool or callable, default False

    Returns
    -------
    lance.LanceDataset
        The handle given, which sees the new index.

    Raises
    ------
    See `train`, `build_artifact` and `finalize`.
    """
    handle = Handle.of(dataset)
    path, dimension = vector_column(handle, column)
    index_type = index_type_name(index_type)
    metric = metric_name(metric)
    num_partitions = whole_number("num_partitions", num_partitions)
    ids = fragment_list(fragment_ids)
    wanted = Wanted(name or f"{path}_idx", replace, handle.field_id(path), path, index_type, metric)
    check_name(handle.latest(), wanted, ids or handle.fragment_ids(), handle.fragments_since())
    if artifact_uri is not None:
        artifact_uri = check_place(handle, artifact_uri)
        storage_options = store_options(handle, artifact_uri, storage_options)
    chosen = resolve_backend(backend, devices)
    if keep_artifact and artifact_uri is None:
        raise InvalidInputError("keep_artifact: got True without artifact_uri; say where to keep it")
    check_hnsw(index_type, m, ef_construction)
    if pq_codebook is not None:
        if ivf_centroids is None:
            raise InvalidInputError("ivf_centroids must be specified when pq_codebook is provided")
        model = given_model(ivf_centroids, pq_codebook, metric, num_sub_vectors)
        if num_partitions not in (None, model.num_partitions):
            raise InvalidInputError(
                f"Ivf centroids has {model.num_partitions} clusters, but num_partitions={num_partitions}"
            )
        check_sub_vectors(dimension, model.num_sub_vectors, model.num_bits)
        if num_bits not in (8, model.num_bits):
            raise InvalidInputError(f"num_bits: got {num_bits}, the codebook has {model.num_bits}")
        source, bits = handle.vectors(path, ids), model.num_bits
        width, partitions = model.pq_code_width, model.num_partitions
        check_target(source, artifact_uri, partitions, width, bits, memory_limit, storage_options)
        model = model.with_training(
            target_partition_size=target_partition_size, sample_rate=sample_rate, max_iters=max_iters
        )
    else:
        if num_sub_vectors is not None:
            check_sub_vectors(dimension, num_sub_vectors, num_bits)
            width = num_sub_vectors * num_bits // 8
            rows = handle.count_rows(ids)
            partitions = wanted_partitions(
                num_partitions, ivf_centroids, rows, target_partition_size, sample_rate
            )
            source = handle.vectors(path, ids)
            check_target(source, artifact_uri, partitions, width, num_bits, memory_limit, storage_options)
        model = train(
            handle.dataset,
            path,
            metric=metric,
            num_partitions=num_partitions,
            num_sub_vectors=num_sub_vectors,
            num_bits=num_bits,
            sample_rate=sample_rate,
            max_iters=max_iters,
            seed=seed,
            ivf_centroids=ivf_centroids,
            fragment_ids=fragment_ids,
            target_partition_size=target_partition_size,
            backend=chosen,
            memory_limit=memory_limit,
            progress=progress,
        )
    temporary = artifact_uri is None
    with temporary_artifact() if artifact_uri is None else nullcontext(artifact_uri) as artifact_uri:
        artifact = build_artifact(
            handle.dataset,
            path,
            model,
            artifact_uri,
            backend=chosen,
            fragment_ids=fragment_ids,
            memory_limit=memory_limit,
            storage_options=storage_options,
            # What is removed in a moment need not survive a crash of the machine.
            sync=not temporary,
            progress=progress,
        )
        finalize(
            handle.dataset,
            path,
            artifact,
            name=name,
            replace=replace,
            index_type=index_type,
            m=m,
            ef_construction=ef_construction,
            # A backend that writes its artifact itself may not say what it read: all that it was given.
            fragment_ids=None if "source" in artifact.manifest else ids or handle.fragment_ids(),
            sync=sync,
            memory_limit=memory_limit,
            progress=progress,
            backend_name=chosen.name,
        )
        handle.refresh()
        if not temporary and keep_artifact is False:
            discard_artifact(artifact, str(artifact_uri), storage_options)
        return handle.user
