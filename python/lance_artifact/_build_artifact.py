"""`build_artifact`: every row of the column, encoded. And `describe_source`, for encoders of others."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._arguments import Progress, StorageOptions, fragment_list, open_builder
from ._artifacts import check_place, store_options
from ._assign import check_assign, tell_assigned
from ._calls import awaited
from ._checked import checked
from ._dataset import Handle, vector_column
from ._encode import encode_on_devices, encode_with, finished
from ._lance_artifact import Artifact, IvfPqModel
from ._log import stage
from ._process import terminable
from ._progress import reporter
from ._tidy import tidy_up
from .backends import Backend, DatasetBackend, DeviceEncoder, resolve_backend
from .backends.cpu import CpuBackend
from .exceptions import ArtifactMismatchError, InvalidInputError

if TYPE_CHECKING:
    import lance


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
def build_artifact(
    dataset: lance.LanceDataset | str | Path,
    column: str,
    model: IvfPqModel,
    artifact_uri: str | Path,
    *,
    backend: str | Backend = "auto",
    devices: Sequence[int] | None = None,
    device_memory_limit: int | None = None,
    batch_rows: int | None = None,
    assign: str = "exact",
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
    device_memory_limit : int, optional
        Bytes that a GPU backend may take of each device, beside CUDA's own; default what is free. With less the batches are smaller.
    batch_rows : int, optional
        Rows that a GPU gets at once. Default: chosen from its free memory, up to 65,536 rows or 64 MiB.
    assign : {"exact", "fast"}, default "exact"
        "fast", of the CPU backend: each row is compared with the centroids of the groups nearest to it instead of with all centroids, two
        to five times as quick where there are thousands of partitions. In how many groups to look is found from a sample of the rows, so
        that at most one in a thousand is not with its nearest centroid. How many were is counted while they are encoded, logged and
        recorded in ``artifact.manifest["assignment"]``, and warned of where it is more. Where it would be no quicker, or the sample is too
        small to tell, all centroids are compared.
    fragment_ids : sequence of int, optional
        Encode these fragments only: one worker's share.
    memory_limit : int, optional
        Bytes that the call may hold, beside what the process had before; default half of the memory that this machine, or its
        container, has free, of which the writer takes 1 GiB or a quarter of RAM at most.
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
    chosen = resolve_backend(backend, devices, device_memory_limit)
    check_assign(assign, chosen)
    artifact_uri = check_place(handle, artifact_uri)
    storage_options = store_options(handle, artifact_uri, storage_options)
    source = handle.vectors(path, fragment_list(fragment_ids))
    if (model.dtype, model.dimension) != (source.dtype, source.dimension):
        raise ArtifactMismatchError(
            f"the model is {model.dtype}[{model.dimension}], column {path!r} is {source.dtype}[{source.dimension}]"
        )
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
        with _encoding(chosen, source.count_rows()) as told:
            written = chosen.write_artifact(
                handle.dataset, path, model, artifact_uri, fragment_list(fragment_ids)
            )
            told |= _counts(written)
        return written
    encoder = chosen.encoder(model)
    if batch_rows is not None and not isinstance(encoder, DeviceEncoder):
        raise InvalidInputError(
            f"batch_rows: backend {chosen.name!r} does not encode on a device and takes none"
        )
    if batch_rows is not None and batch_rows < 1:
        raise InvalidInputError(f"batch_rows: got {batch_rows}, expected at least 1")
    limit, scan, _ = source.encode_shares(model.num_partitions, model.num_bits, memory_limit)
    source = source.with_scan_bytes(scan)
    builder = open_builder(
        source,
        artifact_uri,
        model,
        model.num_partitions,
        model.pq_code_width,
        model.num_bits,
        num_buckets=num_buckets,
        memory_limit=memory_limit,
        overwrite=overwrite,
        storage_options=storage_options,
        described=source.describe(),
        sync=sync,
    )
    try:
        with _encoding(chosen, source.count_rows()) as told:
            if isinstance(chosen, CpuBackend):
                seen, dropped = source.encode_on_cpu(model, builder, limit, assign == "fast", report)
            elif isinstance(encoder, DeviceEncoder):
                seen, dropped, _ = encode_on_devices(encoder, model, source, builder, batch_rows, report)
            else:
                seen, dropped = encode_with(chosen, encoder, model, source, builder, report)
            artifact = finished(builder, seen, dropped)
            told |= _counts(artifact)
        tell_assigned(artifact, assign)
        return artifact
    except BaseException as error:
        tidy_up(error, builder.abort)
        raise


def _encoding(chosen: Backend, rows: int) -> AbstractContextManager[dict[str, Any]]:
    return stage(
        "encoded",
        "encoding {rows_expected} rows with backend {backend}",
        "encoded {rows} rows into {artifact} in {seconds:.2f} s; dropped: {dropped}",
        backend=chosen.name,
        rows_expected=rows,
    )


def _counts(artifact: Artifact) -> dict[str, Any]:
    return {
        "artifact": artifact.uri,
        "rows": artifact.num_rows,
        "dropped": artifact.manifest.get("rows", {}).get("dropped", {}),
    }
