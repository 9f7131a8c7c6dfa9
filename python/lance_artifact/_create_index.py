"""`create_index`: train, encode and finalize in one call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ._arguments import (
    Progress,
    StorageOptions,
    check_hnsw,
    check_sub_vectors,
    check_target,
    fragment_list,
    given_model,
    index_mode,
    index_type_name,
    metric_name,
    wanted_partitions,
    whole_number,
)
from ._artifacts import Asked, check_place, discard_artifact, published_artifact, store_options
from ._build_artifact import build_artifact
from ._calls import awaited
from ._checked import checked
from ._commit import Wanted, check_name
from ._dataset import Handle, vector_column
from ._evaluate import check_recall
from ._finalize import finalize
from ._lance_artifact import IvfPqModel
from ._process import temporary_artifact, terminable
from ._resume import create_by_run, is_run
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
    resume: bool | None = None,
    num_shards: int | None = None,
    verify: bool = False,
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
    mode = index_mode(replace, None)
    wanted = Wanted(name or f"{path}_idx", mode, handle.field_id(path), path, index_type, metric)
    check_hnsw(index_type, m, ef_construction)
    model = None
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
        num_sub_vectors, num_bits = model.num_sub_vectors, model.num_bits
        model = model.with_training(
            target_partition_size=target_partition_size, sample_rate=sample_rate, max_iters=max_iters
        )
    elif num_sub_vectors is not None:
        check_sub_vectors(dimension, num_sub_vectors, num_bits)
    if artifact_uri is not None:
        artifact_uri = check_place(handle, artifact_uri)
        storage_options = store_options(handle, artifact_uri, storage_options)
    elif resume or num_shards:
        raise InvalidInputError("resume and num_shards: are of a run, which needs artifact_uri, its folder")
    elif keep_artifact:
        raise InvalidInputError("keep_artifact: got True without artifact_uri; say where to keep it")
    work: dict[str, Any] = {"memory_limit": memory_limit, "progress": progress}
    if artifact_uri is not None and (resume or (resume is None and is_run(artifact_uri, storage_options))):
        created = create_by_run(
            handle,
            wanted,
            artifact_uri,
            storage_options,
            {
                "name": name,
                "metric": metric,
                "num_partitions": num_partitions,
                "num_sub_vectors": num_sub_vectors,
                "num_bits": num_bits,
                "sample_rate": sample_rate,
                "max_iters": max_iters,
                "seed": seed,
                "fragment_ids": ids,
                "target_partition_size": target_partition_size,
                "m": m,
                "ef_construction": ef_construction,
                "num_shards": num_shards,
                "model": model,
                "ivf_centroids": ivf_centroids if model is None else None,
                "backend": resolve_backend(backend, devices),
            },
            keep=keep_artifact is not False,
            sync=sync,
            **work,
        )
        if verify:
            check_recall(created, wanted.name)
        return created
    if num_shards:
        raise InvalidInputError("num_shards: is of a run, which needs resume=True")
    check_name(handle.latest(), wanted, ids or handle.fragment_ids(), handle.fragments_since())
    chosen = resolve_backend(backend, devices)
    artifact = None
    if num_sub_vectors is not None:
        source = handle.vectors(path, ids)
        partitions = wanted_partitions(
            num_partitions, ivf_centroids, handle.count_rows(ids), target_partition_size, sample_rate
        )
        if artifact_uri is not None and resume is None:
            asked = Asked(
                metric, partitions, num_sub_vectors, num_bits, sample_rate, max_iters, target_partition_size
            )
            artifact = published_artifact(source, artifact_uri, storage_options, asked, model, ivf_centroids)
        if artifact is None:
            width = num_sub_vectors * num_bits // 8
            check_target(source, artifact_uri, partitions, width, num_bits, memory_limit, storage_options)
    if artifact is None and model is None:
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
            **work,
        )
    temporary = artifact_uri is None
    with temporary_artifact() if artifact_uri is None else nullcontext(artifact_uri) as artifact_uri:
        if artifact is None:
            artifact = build_artifact(
                handle.dataset,
                path,
                cast(IvfPqModel, model),
                artifact_uri,
                backend=chosen,
                fragment_ids=fragment_ids,
                storage_options=storage_options,
                # What is removed in a moment need not survive a crash of the machine.
                sync=not temporary,
                **work,
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
            backend_name=chosen.name,
            **work,
        )
        handle.refresh()
        if not temporary and keep_artifact is False:
            discard_artifact(artifact, str(artifact_uri), storage_options)
    if verify:
        check_recall(handle.user, wanted.name)
    return handle.user
