"""Encoders in Python: on devices, which the extension feeds, or in a loop over batches that the extension scans ahead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from ._cancel import wait
from ._lance_artifact import Artifact, IvfPqModel, PartitionArtifactBuilder, _VectorSource, encode_on_device
from ._log import LOGGER
from ._progress import Report
from .backends import Backend, DeviceEncoder, Encoder
from .exceptions import InvalidInputError, LanceArtifactError, StorageError


def encode_on_devices(
    encoder: DeviceEncoder,
    model: IvfPqModel,
    source: _VectorSource,
    builder: PartitionArtifactBuilder,
    batch_rows: int | None,
    report: Report | None,
) -> tuple[int, dict[str, int], list[dict[str, Any]]]:
    """Rows seen, rows dropped by reason, and what each device did."""
    seen, dropped, reports = encode_on_device(
        source,
        model,
        builder,
        encoder,
        list(encoder.devices),
        batch_rows=batch_rows,
        device_memory_limit=getattr(encoder, "device_memory_limit", None),
        progress=report,
    )
    for device in reports:
        for note in device["notes"]:
            LOGGER.warning("%s: %s", device["device"], note)
        LOGGER.info(
            "%s encoded %d rows in batches of %d: waited %.2f s for the scan, filled slots %.2f s, copied %.2f s, "
            "encoded %.2f s, waited %.2f s for the writer",
            *(device[key] for key in ("device", "rows", "batch_rows", "scan_wait_seconds", "fill_seconds",
                                      "copy_seconds", "encode_seconds", "write_seconds")),
        )  # fmt: skip
    return seen, dropped, reports


# Seconds between the times that a finished build is published again, which the builder itself has tried for some seconds.
PATIENCE = (10, 20, 40, 80, 160)


def finished(builder: PartitionArtifactBuilder, seen: int, dropped: dict[str, int]) -> Artifact:
    """Publish a build whose rows are all written. A store that is away for some minutes does not cost the hours before."""
    for seconds in PATIENCE:
        try:
            return builder.finish(rows_seen=seen, rows_dropped=dropped)
        except StorageError as error:
            if not builder.can_finish_again:
                raise
            LOGGER.warning("%s; trying again in %d s", error, seconds)
        wait(seconds)
    return builder.finish(rows_seen=seen, rows_dropped=dropped)


def encode_with(
    backend: Backend,
    encoder: Encoder,
    model: IvfPqModel,
    source: _VectorSource,
    builder: PartitionArtifactBuilder,
    report: Report | None,
) -> tuple[int, dict[str, int]]:
    """The loop for encoders in Python: a batch is prepared and scanned ahead in the extension, encoded here."""
    scan = source.scan(model.metric)
    total, seen = source.count_rows(), 0
    if report:
        report("start", "shuffle", 0, total, "rows")
    for batch in scan:
        if batch.num_rows == 0:
            continue
        part_id, pq_code = encoder.encode(batch.column(1))
        builder.append_batch(_encoded(backend, model, batch.column(0), part_id, pq_code))
        seen = builder.num_rows + sum(scan.dropped.values())
        if report:
            report("progress", "shuffle", seen, total, "rows")
    # Batches whose rows were all dropped count too, the last one among them.
    seen = builder.num_rows + sum(scan.dropped.values())
    if seen != total:
        raise LanceArtifactError(f"the scan gave {seen} rows, the dataset has {total} in these fragments")
    if report:
        report("complete", "shuffle", total, total, "rows")
    return seen, scan.dropped


def _encoded(
    backend: Backend, model: IvfPqModel, row_ids: pa.Array, part_id: Any, pq_code: Any
) -> pa.RecordBatch:
    rows, width = len(row_ids), model.pq_code_width
    if isinstance(pq_code, (pa.Array, pa.ChunkedArray)):
        codes = pq_code.combine_chunks() if isinstance(pq_code, pa.ChunkedArray) else pq_code
    else:
        array = np.asarray(pq_code)
        if array.shape != (rows, width) or array.dtype != np.uint8:
            raise InvalidInputError(
                f"backend {backend.name!r}: pq_code is {array.dtype}{array.shape}, expected uint8({rows}, {width})"
            )
        codes = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), width)
    if not isinstance(part_id, pa.Array):
        ids = np.asarray(part_id)
        if ids.shape != (rows,) or ids.dtype != np.uint32:
            raise InvalidInputError(
                f"backend {backend.name!r}: part_id is {ids.dtype}{ids.shape}, expected uint32({rows},)"
            )
        part_id = pa.array(ids)
    if len(part_id) != rows or len(codes) != rows:
        raise InvalidInputError(
            f"backend {backend.name!r}: {len(part_id)} part_id and {len(codes)} pq_code for {rows} vectors"
        )
    return pa.RecordBatch.from_arrays([row_ids, part_id, codes], ["_rowid", "__ivf_part_id", "__pq_code"])
