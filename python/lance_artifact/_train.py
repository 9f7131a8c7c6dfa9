"""`train`: a model of a sample of the column."""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
    fixed_size_list,
    fragment_list,
    metric_name,
)
from ._calls import awaited
from ._checked import checked
from ._dataset import Handle, vector_column
from ._lance_artifact import IvfPqModel
from ._process import terminable
from ._progress import reporter
from .backends import Backend, DatasetBackend, TrainParams, resolve_backend
from .exceptions import InvalidInputError

if TYPE_CHECKING:
    import lance

LOGGER = logging.getLogger("lance_artifact")


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
    memory_limit: int | None = None,
    progress: Progress = False,
) -> IvfPqModel:
    """Train centroids and codebook on a random sample of the column, drawn without loading the column.

    Parameters
    ----------
    dataset : lance.LanceDataset, LanceDB table, or path
    column : str
        ``fixed_size_list<float16|float32|float64>``; nested as ``"a.b"``.
    metric : {"l2", "euclidean", "cosine", "dot"}, default "l2"
    num_partitions : int, optional
        Default as in pylance: rows / target_partition_size, between 1 and 4096.
    num_sub_vectors : int
        A divisor of the dimension.
    num_bits : {4, 8}, default 8
    sample_rate : int, default 256
        Training vectors per centroid and per codeword.
    max_iters : int, default 50
    seed : int, default 0
        The same seed, version and backend give the same model.
    ivf_centroids : array (num_partitions, dimension), optional
        Train only the codebook, for these centroids.
    fragment_ids : sequence of int, optional
        Train on these fragments only.
    target_partition_size : int, default 8192
        Rows of a partition where num_partitions is not given.
    backend : str or Backend, default "auto"
    devices : sequence of int, optional
        GPUs of a backend that has them; the first one trains. Default the first visible one.
    memory_limit : int, optional
        Bytes that the call may hold, beside what the process had before; default half of the memory that this machine, or its
        container, has free. The sample is as large as fits; a warning says so where that is less than it should be.
    progress : bool or callable, default False
        True: a tqdm bar on a terminal. A callable gets `lance.progress.IndexProgress`.

    Raises
    ------
    InvalidInputError, ColumnNotFoundError, ColumnTypeError
        A parameter does not fit, or there are too few usable vectors.
    BackendUnavailableError
        The backend that was named cannot run here.
    """
    handle = Handle.of(dataset)
    path, dimension = vector_column(handle, column)
    metric = metric_name(metric)
    chosen = resolve_backend(backend, devices)
    ids = fragment_list(fragment_ids)
    if num_sub_vectors is None:
        raise InvalidInputError(
            "num_sub_vectors: got None; num_partitions and num_sub_vectors are required for IVF_PQ"
        )
    check_sub_vectors(dimension, num_sub_vectors, num_bits)
    given = None
    if ivf_centroids is not None:
        given = fixed_size_list("ivf_centroids", ivf_centroids)
        if num_partitions not in (None, len(given)):
            raise InvalidInputError(
                f"Ivf centroids has {len(given)} clusters, but num_partitions={num_partitions}"
            )
        num_partitions = len(given)
    if num_partitions is None:
        num_partitions = default_partitions(handle.count_rows(ids), target_partition_size, sample_rate)
    params = TrainParams(
        metric, num_partitions, num_sub_vectors, num_bits, sample_rate, max_iters, seed, given
    )
    check_training(params)
    recorded = {
        "target_partition_size": target_partition_size,
        "sample_rate": sample_rate,
        "max_iters": max_iters,
    }
    if isinstance(chosen, DatasetBackend):
        if memory_limit is not None:
            raise InvalidInputError(
                f"memory_limit: backend {chosen.name!r} reads the column itself and takes none"
            )
        return chosen.train_on_dataset(handle.dataset, path, params, ids).with_training(**recorded)
    source = handle.vectors(path, ids)
    wanted = sample_rate * (max(num_partitions, 2**num_bits) if given is None else 2**num_bits)
    limit, scan, most = source.train_shares(
        num_partitions, num_sub_vectors, num_bits, sample_rate, given is None, memory_limit
    )
    wanted = bounded_sample(chosen, params, wanted, min(wanted, source.count_rows()), most, dimension)
    sample = source.with_scan_bytes(scan).sample(wanted, metric, seed, limit)
    return train_on(sample, chosen, params, progress).with_training(**recorded)


def train_on(
    sample: pa.FixedSizeListArray, chosen: Backend, params: TrainParams, progress: Progress
) -> IvfPqModel:
    """A model of prepared vectors in random order."""
    LOGGER.info("training on %d vectors with backend %s", len(sample), chosen.name)
    model = chosen.train(sample, params, progress=reporter(progress))
    check_model(chosen, model, params, sample)
    return model
