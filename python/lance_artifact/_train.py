"""`train`: a model of a sample of the column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ._arguments import (
    Progress,
    bounded_sample,
    check_model,
    check_sub_vectors,
    check_training,
    default_partitions,
    default_sub_vectors,
    fragment_list,
    given_centroids,
    metric_name,
    one_progress,
)
from ._calls import awaited
from ._checked import checked
from ._codebook_rate import one_rate, rate_of_codebook
from ._dataset import Handle, vector_column
from ._lance_artifact import IvfPqModel
from ._log import LOGGER, stage
from ._process import terminable
from ._progress import reporter
from .backends import Backend, DatasetBackend, TrainParams, resolve_backend
from .backends.cpu import CpuBackend
from .exceptions import InvalidInputError

if TYPE_CHECKING:
    import lance
    from lance.progress import IndexProgress

    from ._lance_artifact import _VectorSource


@terminable()
@awaited
@checked
def train(
    dataset: lance.LanceDataset | str | Path,
    column: str,
    *,
    metric: str = "l2",
    num_partitions: int | None = None,
    num_sub_vectors: int | None = None,
    num_bits: int = 8,
    sample_rate: int = 256,
    max_iters: int = 50,
    seed: int = 0,
    ivf_centroids: Any = None,
    fragment_ids: Sequence[int] | None = None,
    target_partition_size: int | None = None,
    backend: str | Backend = "auto",
    devices: Sequence[int] | None = None,
    device_memory_limit: int | None = None,
    memory_limit: int | None = None,
    progress: Progress = False,
    progress_callback: Callable[[IndexProgress], Any] | None = None,
) -> IvfPqModel:
    """Train centroids and codebook on a random sample of the column, drawn without loading the column.

    A few vectors of the sample (at most one in a thousand) whose largest element is more than ten thousand times that of the median
    vector are left out of it, with a warning, for all others would share what codewords they leave. They are encoded all the same.
    For dot these are those above 1e12 times, for the largest are what searches find; for cosine all have the same length.

    Parameters
    ----------
    dataset : lance.LanceDataset, LanceDB table, or path
    column : str
        ``fixed_size_list<float16|float32|float64>``; nested as ``"a.b"``.
    metric : {"l2", "euclidean", "cosine", "dot"}, default "l2"
    num_partitions : int, optional
        Default as in pylance: rows / target_partition_size, between 1 and 4096.
    num_sub_vectors : int, optional
        A divisor of the dimension. Default as in LanceDB: dimension / 16, else dimension / 8, where that divides it.
    num_bits : {4, 8}, default 8
    sample_rate : int, default 256
        Training vectors per centroid and per codeword.
    max_iters : int, default 50
    seed : int, default 0
        The same seed, version and backend give the same model.
    ivf_centroids : array (num_partitions, dimension), optional
        Train only the codebook, for these centroids, which are cast to the dtype of the column.
    fragment_ids : sequence of int, optional
        Train on these fragments only.
    target_partition_size : int, default 8192
        Rows of a partition where num_partitions is not given.
    backend : str or Backend, default "auto"
    devices : sequence of int, optional
        GPUs of a backend that has them; the first one trains. Default the first visible one.
    device_memory_limit : int, optional
        Bytes that a GPU backend may take of each device, beside CUDA's own; default what is free. A sample that is larger than what
        the device may hold of it goes through it in parts, as memory_limit's does.
    memory_limit : int, optional
        Bytes that the call may hold, beside what the process had before; default half of the memory that this machine, or its
        container, has free. A sample that is larger comes in parts: centroids are trained on one that fits, and then each goes to the
        mean of its vectors in all of them; a warning says so. Other backends than the CPU's train on what fits.
    progress : bool or callable, default False
        True: a tqdm bar on a terminal. A callable gets `lance.progress.IndexProgress`; what it raises ends the call.
    progress_callback : callable, optional
        As a callable progress, by pylance's name for it.

    Raises
    ------
    InvalidInputError, ColumnNotFoundError, ColumnTypeError
        A parameter does not fit, there are too few usable vectors, or one is so large that its distances overflow.
    BackendUnavailableError
        The backend that was named cannot run here.
    """
    handle = Handle.of(dataset)
    path, dimension = vector_column(handle, column)
    metric = metric_name(metric)
    chosen = resolve_backend(backend, devices, device_memory_limit)
    ids = fragment_list(fragment_ids)
    if num_sub_vectors is None:
        num_sub_vectors, _ = default_sub_vectors(dimension, num_bits)
    check_sub_vectors(dimension, num_sub_vectors, num_bits)
    given = None
    if ivf_centroids is not None:
        given = given_centroids(ivf_centroids, handle.vectors(path, ids).dtype)
        if num_partitions not in (None, len(given)):
            raise InvalidInputError(
                f"Ivf centroids has {len(given)} clusters, but num_partitions={num_partitions}"
            )
        num_partitions = len(given)
    if num_partitions is None:
        num_partitions = default_partitions(handle.count_rows(ids), target_partition_size)
    params = TrainParams(
        metric, num_partitions, num_sub_vectors, num_bits, sample_rate, max_iters, seed, given
    )
    try:
        return train_handle(
            handle,
            path,
            params,
            ids,
            target_partition_size,
            chosen,
            memory_limit,
            one_progress(progress, progress_callback),
        )
    except TooFewVectors as error:
        raise InvalidInputError(str(error)) from None


class TooFewVectors(InvalidInputError):
    """Fewer usable vectors than codewords.

    Attributes
    ----------
    found : int
    """

    found = 0


def train_handle(
    handle: Handle,
    path: str,
    params: TrainParams,
    ids: list[int] | None,
    target_partition_size: int | None,
    chosen: Backend,
    memory_limit: int | None,
    progress: Progress,
) -> IvfPqModel:
    """`train`, of a column that is open and parameters that were checked one by one.

    Raises
    ------
    TooFewVectors
    """
    check_training(params)
    recorded = {
        "target_partition_size": target_partition_size,
        "sample_rate": params.sample_rate,
        "max_iters": params.max_iters,
    }
    if isinstance(chosen, DatasetBackend):
        if memory_limit is not None:
            raise InvalidInputError(
                f"memory_limit: backend {chosen.name!r} reads the column itself and takes none"
            )
        asked = replace(params, sample_rate=one_rate(params.sample_rate))
        return chosen.train_on_dataset(handle.dataset, path, asked, ids).with_training(**recorded)
    source = handle.vectors(path, ids)
    given = params.ivf_centroids is not None
    codes = 2**params.num_bits
    of_codebook = rate_of_codebook(params.sample_rate)
    wanted = of_codebook * codes
    if not given:
        wanted = max(wanted, params.sample_rate * params.num_partitions)
    # One for each centroid and codeword, whatever the rate is.
    least = codes if given else max(params.num_partitions, codes)
    wanted = max(wanted, least)
    limit, scan, most = source.train_shares(
        params.num_partitions,
        params.num_sub_vectors,
        params.num_bits,
        of_codebook,
        not given,
        memory_limit,
    )
    there = min(wanted, source.count_rows())
    for_centroids = min(there, params.sample_rate * params.num_partitions)
    if isinstance(chosen, CpuBackend) and not given and params.num_partitions <= most < for_centroids:
        centroids = centroids_in_parts(
            source.with_scan_bytes(scan), params, for_centroids, most, limit, progress
        )
        params = replace(params, ivf_centroids=centroids)
        trained = train_handle(handle, path, params, ids, target_partition_size, chosen, limit, progress)
        return trained.with_training(**recorded)
    wanted = bounded_sample(params, wanted, there, most)
    check_fits = getattr(chosen, "check_fits", None)
    if check_fits is not None:
        check_fits(params, source.dimension)
    in_any_order = getattr(chosen, "takes_any_order", False)
    sample = source.with_scan_bytes(scan).sample(
        wanted, params.metric, params.seed, limit, shuffled=not in_any_order, least=least
    )
    if len(sample) < codes:
        lower = "" if params.num_bits == 4 else ", or lower num_bits to 4, which takes 16"
        error = TooFewVectors(
            f"training: {len(sample)} usable vectors, expected at least {codes}, one for each code of a sub-vector; add rows{lower}"
        )
        error.found = len(sample)
        raise error
    return train_on(sample, chosen, params, progress, of_codebook).with_training(**recorded)


def centroids_in_parts(
    source: _VectorSource, params: TrainParams, rows: int, at_once: int, limit: int, progress: Progress
) -> pa.FixedSizeListArray:
    """Centroids of a sample of ``rows`` vectors, of which memory holds ``at_once``."""
    if at_once < rows:
        LOGGER.warning(
            "training centroids on %d vectors, and moving them to the means of %d, which come in parts: more do not fit memory_limit",
            at_once,
            rows,
        )
    with stage(
        "trained",
        "training {num_partitions} centroids on {vectors} vectors, {at_once} at once",
        "trained {num_partitions} centroids in {seconds:.2f} s",
        vectors=rows,
        at_once=at_once,
        num_partitions=params.num_partitions,
        metric=params.metric,
    ):
        return source.train_centroids_in_parts(
            rows,
            at_once,
            params.metric,
            num_partitions=params.num_partitions,
            sample_rate=params.sample_rate,
            max_iters=params.max_iters,
            seed=params.seed,
            memory_limit=limit,
            progress=reporter(progress),
        )


def train_on(
    sample: pa.FixedSizeListArray,
    chosen: Backend,
    params: TrainParams,
    progress: Progress,
    of_codebook: int | None = None,
) -> IvfPqModel:
    """A model of prepared vectors in random order; ``of_codebook`` is the sample rate of its codebook, by default that of the centroids."""
    with stage(
        "trained",
        "training {num_partitions} partitions and {num_sub_vectors} sub-vectors on {vectors} vectors with backend {backend}",
        "trained {num_partitions} partitions in {seconds:.2f} s",
        backend=chosen.name,
        vectors=len(sample),
        num_partitions=params.num_partitions,
        num_sub_vectors=params.num_sub_vectors,
        num_bits=params.num_bits,
        metric=params.metric,
    ):
        if of_codebook not in (None, params.sample_rate):
            if params.ivf_centroids is None:
                first = chosen.train(sample, of_centroids(params, sample), progress=reporter(progress))
                params = replace(params, ivf_centroids=first.ivf_centroids)
            params = replace(params, sample_rate=of_codebook)
        model = chosen.train(sample, params, progress=reporter(progress))
    check_model(chosen, model, params, sample)
    return model


def of_centroids(params: TrainParams, sample: pa.FixedSizeListArray) -> TrainParams:
    """For centroids alone: with the smallest codebook, which nobody asks for."""
    sub_vectors, bits = (2, 4) if sample.type.list_size % 2 == 0 else (1, 8)
    return replace(params, num_sub_vectors=sub_vectors, num_bits=bits)
