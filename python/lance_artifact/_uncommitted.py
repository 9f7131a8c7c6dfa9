"""pylance's own door for distributed builds: a segment over some fragments, which the caller merges and commits."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

from ._arguments import (
    DEFAULT_BITS,
    Progress,
    check_asked,
    check_hnsw,
    check_sub_vectors,
    fragment_list,
    given_model,
    index_type_name,
    metric_name,
    one_progress,
)
from ._assign import check_assign
from ._build_artifact import build_artifact
from ._build_segment import build_segment
from ._calls import awaited
from ._checked import checked
from ._dataset import Handle, vector_column
from ._process import temporary_artifact, terminable
from ._pylance import PylanceArguments, centroids_of_file, check_pylance_arguments
from ._train import train
from .backends import Backend, resolve_accelerator, resolve_backend
from .exceptions import InvalidInputError

if TYPE_CHECKING:
    import lance
    from lance.dataset import Index


@terminable()
@awaited
@checked
def create_index_uncommitted(
    dataset: lance.LanceDataset,
    column: str | list[str],
    index_type: str = "IVF_PQ",
    name: str | None = None,
    metric: str = "L2",
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
    index_uuid: str | None = None,
    max_level: int = 7,
    ivf_centroids_file: str | None = None,
    backend: str | Backend = "auto",
    accelerator: str | None = None,
    devices: Sequence[int] | None = None,
    device_memory_limit: int | None = None,
    assign: str = "exact",
    memory_limit: int | None = None,
    progress: Progress = False,
    progress_callback: Any = None,
    **pylance: Unpack[PylanceArguments],
) -> Index:
    """As pylance's method of that name: codes row by row, so that segments of one model can be merged."""
    check_pylance_arguments(pylance, _NAMED, "create_index_uncommitted")
    progress = one_progress(progress, progress_callback)
    handle = Handle.of(dataset)
    path, dimension = vector_column(handle, column)
    index_type = index_type_name(index_type)
    metric = metric_name(metric)
    if fragment_list(fragment_ids) is None:
        raise InvalidInputError(
            "fragment_ids: create_index_uncommitted requires them for a distributed build"
        )
    check_hnsw(index_type, m, ef_construction, max_level)
    if ivf_centroids_file is not None:
        if ivf_centroids is not None:
            raise InvalidInputError(
                "ivf_centroids and ivf_centroids_file cannot be provided at the same time"
            )
        ivf_centroids = centroids_of_file(ivf_centroids_file)
    on = (devices, device_memory_limit)
    chosen = resolve_accelerator(accelerator, *on) if accelerator else resolve_backend(backend, *on)
    check_assign(assign, chosen)
    work: dict[str, Any] = {"memory_limit": memory_limit, "progress": progress}
    training: dict[str, Any] = {
        "target_partition_size": target_partition_size,
        "sample_rate": sample_rate,
        "max_iters": max_iters,
    }
    if pq_codebook is not None:
        if ivf_centroids is None:
            raise InvalidInputError("ivf_centroids must be specified when pq_codebook is provided")
        model = given_model(
            ivf_centroids, pq_codebook, metric, num_sub_vectors, handle.vectors(path, None).dtype
        )
        check_sub_vectors(dimension, model.num_sub_vectors, model.num_bits)
        check_asked(model, num_partitions, num_sub_vectors, num_bits)
        model = model.with_training(**training)
    else:
        model = train(
            handle.dataset,
            path,
            metric=metric,
            num_partitions=num_partitions,
            num_sub_vectors=num_sub_vectors,
            num_bits=DEFAULT_BITS if num_bits is None else num_bits,
            seed=seed,
            ivf_centroids=ivf_centroids,
            fragment_ids=fragment_ids,
            backend=chosen,
            **training,
            **work,
        )
    with temporary_artifact() as uri:
        artifact = build_artifact(
            handle.dataset,
            path,
            model,
            uri,
            backend=chosen,
            assign=assign,
            fragment_ids=fragment_ids,
            sync=False,
            **work,
        )
        return build_segment(
            handle.dataset,
            path,
            artifact,
            model=model,
            name=name,
            index_type=index_type,
            fragment_ids=None if "source" in artifact.manifest else fragment_ids,
            m=m,
            ef_construction=ef_construction,
            max_level=max_level,
            skip_transpose=True,
            index_uuid=index_uuid,
            backend_name=chosen.name,
            **work,
        )


_NAMED = tuple(inspect.signature(create_index_uncommitted).parameters)[:-1]
