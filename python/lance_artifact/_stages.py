"""The stages of a build, each a public function: train, build_artifact, finalize. And `describe_source`, for encoders of others."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _lance_artifact as core
from ._arguments import (
    bounded_sample,
    check_model,
    check_sub_vectors,
    check_training,
    default_partitions,
    fixed_size_list,
    fragment_list,
    index_type_name,
    metric_name,
)
from ._artifacts import check_place, common_version, covered, open_artifacts, store_options
from ._calls import awaited
from ._checked import checked
from ._commit import Attempt, Wanted, check_name, commit_segment
from ._dataset import Handle, vector_column
from ._encode import encode_on_devices, encode_with, finished
from ._lance_artifact import Artifact, IvfPqModel, PartitionArtifactBuilder
from ._process import terminable
from ._progress import reporter
from .backends import Backend, DatasetBackend, DeviceEncoder, TrainParams, resolve_backend
from .backends.cpu import CpuBackend
from .exceptions import ArtifactMismatchError, InvalidInputError

if TYPE_CHECKING:
    import lance
    from lance.progress import IndexProgress

LOGGER = logging.getLogger("lance_artifact")

StorageOptions = dict[str, str] | Callable[[], dict[str, str] | None]
Progress = bool | Callable[["IndexProgress"], Any]


@checked
def describe_source(
    dataset: lance.LanceDataset | str | Path, column: str, fragment_ids: Sequence[int] | None = None
) -> dict[str, Any]:
    """What `PartitionArtifactBuilder(source=)` takes: where rows come from, for the finalizer's checks.

    Parameters
    ----------
    dataset : lance.LanceDataset or path
        At the version the rows are read from.
    column : str
    fragment_ids : sequence of int, optional
        The fragments that are encoded; default all.
    """
    handle = Handle.of(dataset)
    path, _ = vector_column(handle, column)
    described: dict[str, Any] = handle.vectors(path, fragment_list(fragment_ids)).describe()
    return described


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
        return chosen.train_on_dataset(handle.dataset, path, params, ids).with_training(**recorded)
    source = handle.vectors(path, ids)
    wanted = sample_rate * (max(num_partitions, 2**num_bits) if given is None else 2**num_bits)
    wanted = bounded_sample(chosen, params, wanted, min(wanted, source.count_rows()), dimension, source.dtype)
    sample = source.sample(wanted, metric, seed)
    LOGGER.info("training on %d vectors with backend %s", len(sample), chosen.name)
    model = chosen.train(sample, params, progress=reporter(progress))
    check_model(chosen, model, params, sample)
    return model.with_training(**recorded)


@terminable()
@awaited
@checked
def build_artifact(
    dataset: lance.LanceDataset | str | Path,
    column: str,
    model: IvfPqModel,
    artifact_uri: str | Path,
    *,
    backend: str | Backend = "auto",
    devices: Sequence[int] | None = None,
    batch_rows: int | None = None,
    fragment_ids: Sequence[int] | None = None,
    memory_limit: int | None = None,
    num_buckets: int | None = None,
    overwrite: bool = False,
    storage_options: StorageOptions | None = None,
    sync: bool = True,
    progress: Progress = False,
) -> Artifact:
    """Encode every usable vector of a column into a partition artifact.

    Dropped, and counted in ``artifact.manifest["rows"]``, are the rows that Lance's own build leaves out: null vectors,
    vectors with a null, NaN or infinite element, and for cosine those of zero norm.

    Parameters
    ----------
    dataset : lance.LanceDataset, LanceDB table, or path
        Rows are read at its version.
    column : str
    model : IvfPqModel
        Of the column's dtype and dimension.
    artifact_uri : str or path
        Local path, or a URI of an object store.
    backend : str or Backend, default "auto"
    devices : sequence of int, optional
        GPUs of a backend that has them; they share the rows. Default the first visible one.
    batch_rows : int, optional
        Rows that a GPU gets at once. Default: chosen from its free memory, up to 65,536 rows or 64 MiB.
    fragment_ids : sequence of int, optional
        Encode these fragments only: one worker's share.
    memory_limit : int, optional
        Bytes of the writer; default 1 GiB or a quarter of RAM.
    num_buckets : int, optional
        Files of the artifact.
    overwrite : bool, default False
    storage_options : dict, or callable that gives one, optional
        Of the artifact; the dataset's own are taken from its handle, and are the artifact's where that lies in the same store. A
        callable is asked again when what it gave ends (``expires_at_millis``).
    sync : bool, default True
        Wait until the artifact is on the local disk, as PartitionArtifactBuilder does. A backend that writes its artifact
        itself does as it does.
    progress : bool or callable, default False

    Raises
    ------
    ArtifactMismatchError
        The model does not fit the column.
    ArtifactExistsError
        There is an artifact and overwrite is False.
    StorageError
        Reading or writing failed; nothing is left behind.
    DeviceError, DeviceMemoryError
        A GPU failed, or has too little memory also for small batches; nothing is left behind.
    """
    handle = Handle.of(dataset)
    path, _ = vector_column(handle, column)
    chosen = resolve_backend(backend, devices)
    artifact_uri = check_place(handle, artifact_uri)
    storage_options = store_options(handle, artifact_uri, storage_options)
    source = handle.vectors(path, fragment_list(fragment_ids))
    if (model.dtype, model.dimension) != (source.dtype, source.dimension):
        raise ArtifactMismatchError(
            f"the model is {model.dtype}[{model.dimension}], column {path!r} is {source.dtype}[{source.dimension}]"
        )
    LOGGER.info("encoding with backend %s", chosen.name)
    report = reporter(progress)
    if isinstance(chosen, DatasetBackend):
        for what, value in (
            ("memory_limit", memory_limit),
            ("num_buckets", num_buckets),
            ("batch_rows", batch_rows),
        ):
            if value is not None:
                raise InvalidInputError(
                    f"{what}: backend {chosen.name!r} writes its artifact itself and takes none"
                )
        if overwrite or storage_options:
            raise InvalidInputError(
                f"overwrite and storage_options: backend {chosen.name!r} writes its artifact itself, to a new local folder"
            )
        return chosen.write_artifact(handle.dataset, path, model, artifact_uri, fragment_list(fragment_ids))
    encoder = chosen.encoder(model)
    if batch_rows is not None and not isinstance(encoder, DeviceEncoder):
        raise InvalidInputError(
            f"batch_rows: backend {chosen.name!r} does not encode on a device and takes none"
        )
    if batch_rows is not None and batch_rows < 1:
        raise InvalidInputError(f"batch_rows: got {batch_rows}, expected at least 1")
    builder = PartitionArtifactBuilder(
        str(artifact_uri),
        model,
        num_buckets=num_buckets,
        memory_limit=memory_limit,
        overwrite=overwrite,
        storage_options=storage_options,
        source=source.describe(),
        sync=sync,
        expected_rows=source.count_rows(),
    )
    try:
        if isinstance(chosen, CpuBackend):
            seen, dropped = source.encode_on_cpu(model, builder, report)
        elif isinstance(encoder, DeviceEncoder):
            seen, dropped, _ = encode_on_devices(encoder, model, source, builder, batch_rows, report)
        else:
            seen, dropped = encode_with(chosen, encoder, model, source, builder, report)
        return finished(builder, seen, dropped)
    except BaseException:
        builder.abort()
        raise


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
    index_type: str = "IVF_PQ",
    metric: str | None = None,
    fragment_ids: Sequence[int] | None = None,
    m: int = 20,
    ef_construction: int = 150,
    storage_options: StorageOptions | None = None,
    sync: bool = False,
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
        Default ``f"{column}_idx"``.
    replace : bool, default False
    index_type : {"IVF_PQ", "IVF_HNSW_PQ"}
    metric : str, optional
        Must match the model's.
    fragment_ids : sequence of int, optional
        The fragments the index covers. Needed where an artifact does not say which it was encoded from (it was written without
        ``source=``); those that say it must say the same.
    m, ef_construction : int, default 20 and 150
        Of the HNSW graphs of IVF_HNSW_PQ.
    storage_options : dict, or callable that gives one, optional
        For artifacts given by URI; as in `build_artifact`.
    sync : bool, default False
        Wait until the index's files are on the local disk before they are committed. Lance itself leaves that to the system.
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
    handle = Handle.of(dataset)
    path, _ = vector_column(handle, column)
    index_type = index_type_name(index_type)
    name = name or f"{path}_idx"
    ids = fragment_list(fragment_ids)
    opened = open_artifacts(handle, artifacts, storage_options)
    at = handle.at(common_version(handle, opened))
    metrics = [m.metric for m in (model, *(a.model for a in opened)) if m is not None]
    wanted = Wanted(name, replace, handle.field_id(path), path, index_type, metrics[0] if metrics else None)
    path = at.path_of(wanted.field_id, path)
    check_name(handle.latest(), wanted, covered(at, opened, ids), at.fragments_since())
    attempt = Attempt(handle, at, str(uuid.uuid4()))
    hints = {"lance_artifact.version": core.__version__}
    if backend_name:
        hints["lance_artifact.backend"] = backend_name
    try:
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
            fragment_ids=ids,
            hints=hints,
            sync=sync,
            progress=reporter(progress),
        )
        commit_segment(attempt, wanted, segment)
    except BaseException:
        # Ctrl-C may come between the two, when neither is there to clean up, and so may sys.exit() in a callback.
        attempt.discard()
        raise
    return handle.user
