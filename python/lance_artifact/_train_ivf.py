"""Centroids alone, for callers who train the codebook elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ._arguments import (
    DEFAULT_BITS,
    Progress,
    bounded_sample,
    check_training,
    fixed_size_list,
    fragment_list,
    metric_name,
    one_progress,
)
from ._calls import awaited
from ._checked import checked
from ._dataset import Handle, vector_column
from ._log import stage
from ._process import terminable
from ._progress import reporter
from ._train import centroids_in_parts, train_handle
from .backends import Backend, TrainParams, resolve_backend
from .backends.cpu import CpuBackend

if TYPE_CHECKING:
    import lance


@terminable()
@awaited
@checked
def train_ivf(
    dataset: lance.LanceDataset,
    column: str,
    *,
    num_partitions: int,
    metric: str = "l2",
    sample_rate: int = 256,
    max_iters: int = 50,
    seed: int = 0,
    fragment_ids: Sequence[int] | None = None,
    backend: str | Backend = "auto",
    memory_limit: int | None = None,
    progress: Progress = False,
    progress_callback: Any = None,
) -> pa.FixedSizeListArray:
    """The centroids of `train`, of a sample that need not be large enough for a codebook."""
    progress = one_progress(progress, progress_callback)
    handle = Handle.of(dataset)
    path, dimension = vector_column(handle, column)
    ids = fragment_list(fragment_ids)
    chosen = resolve_backend(backend)
    metric = metric_name(metric)
    # The cheapest codebook, where one has to be trained beside them.
    params = TrainParams(metric, num_partitions, 1, DEFAULT_BITS, sample_rate, max_iters, seed)
    check_training(params)
    on_cpu = isinstance(chosen, CpuBackend)
    train: Any = getattr(chosen, "train_centroids", None)
    if train is None and not on_cpu:
        return train_handle(handle, path, params, ids, None, chosen, memory_limit, progress).ivf_centroids
    source = handle.vectors(path, ids)
    wanted = sample_rate * num_partitions
    limit, scan, most = source.train_shares(num_partitions, 1, DEFAULT_BITS, sample_rate, True, memory_limit)
    source = source.with_scan_bytes(scan)
    there = min(wanted, source.count_rows())
    if on_cpu and num_partitions <= most:
        return centroids_in_parts(source, params, there, min(there, most), limit, progress)
    wanted = bounded_sample(params, wanted, there, most)
    check_fits = getattr(chosen, "check_fits", None)
    if check_fits is not None:
        check_fits(params, dimension)
    shuffled = not getattr(chosen, "takes_any_order", False)
    sample = source.sample(wanted, metric, seed, limit, shuffled=shuffled, least=num_partitions)
    with stage(
        "trained",
        "training {num_partitions} centroids on {vectors} vectors with backend {backend}",
        "trained {num_partitions} centroids in {seconds:.2f} s",
        backend=chosen.name,
        vectors=len(sample),
        num_partitions=num_partitions,
        metric=metric,
    ):
        return fixed_size_list("centroids", train(sample, params, progress=reporter(progress)))
