"""What a build takes: memory, disk, bytes and time, guessed before it starts from some seconds of its own work."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ._lance_artifact import CpuEncoder, IvfPqModel, _VectorSource
from .backends import Backend
from .backends.cpu import CpuBackend
from .exceptions import LanceArtifactError

if TYPE_CHECKING:
    from ._plan import BuildPlan

# Rows that are read and encoded to see how fast that is, and the seconds after which reading stops.
ROWS, SECONDS = 16_384, 3.0
# Passes over their sample that codewords take, and bytes of an index that a core puts together in a second.
PASSES_OF_CODEWORDS, FINALIZE_BYTES = 9, 40e6
# From so many partitions on assign="fast" looks at groups, which takes about so much of the time.
LEAST_GROUPED, PART_OF_GROUPS = 2048, 0.4


@dataclass(frozen=True)
class Estimate:
    """What a build takes, about.

    Attributes
    ----------
    least_memory : int
        Bytes: the least ``memory_limit`` that finalize needs.
    artifact_bytes, index_bytes : int
        On disk, for the time of the build and after it.
    bytes_read, bytes_written : int
    seconds : mapping of str to float
        By stage; empty where it is not known.
    rows_dropped : int
        Rows without a usable vector, from those that were read.
    """

    least_memory: int
    artifact_bytes: int
    index_bytes: int
    bytes_read: int
    bytes_written: int
    seconds: Mapping[str, float]
    rows_dropped: int


def estimate(plan: BuildPlan, source: _VectorSource, backend: Backend, calibrate: bool) -> Estimate:
    element = {"float16": 2, "float32": 4, "float64": 8}[plan.dtype]
    vector = plan.dimension * element
    model = (plan.num_partitions + 2**plan.num_bits) * vector
    artifact = plan.num_rows * (12 + plan.pq_code_width) + model * len(plan.shards)
    index = plan.num_rows * (8 + plan.pq_code_width) + model
    sample = min(plan.num_rows, plan.sample_rate * max(plan.num_partitions, 2**plan.num_bits))
    sample = 0 if plan.model is not None else sample
    _, _, writer = source.encode_shares(plan.num_partitions, plan.num_bits, None)
    seconds: dict[str, float] = {}
    dropped = 0
    if calibrate and plan.num_rows:
        seconds, dropped = _calibrate(plan, source, backend, sample, index)
    return Estimate(
        source.least_to_finalize(plan.num_partitions, plan.pq_code_width, plan.num_bits, writer),
        artifact,
        index,
        plan.num_rows * vector + sample * vector + artifact,
        artifact + index,
        seconds,
        dropped,
    )


def _calibrate(
    plan: BuildPlan, source: _VectorSource, backend: Backend, sample: int, index: int
) -> tuple[dict[str, float], int]:
    start = time.perf_counter()
    scan, batches, rows = source.with_scan_bytes(64 << 20).scan(plan.metric), [], 0
    try:
        for batch in scan:
            batches.append(batch.column(1))
            rows += batch.num_rows
            if rows >= ROWS or time.perf_counter() - start > SECONDS:
                break
    except LanceArtifactError:
        # What cannot be read is the build's to say.
        return {}, 0
    seen = rows + sum(scan.dropped.values())
    reading = time.perf_counter() - start
    dropped = round(plan.num_rows * sum(scan.dropped.values()) / seen) if seen else 0
    if rows < 64 or not isinstance(backend, CpuBackend):
        return {}, dropped
    vectors = pa.chunked_array(batches).combine_chunks().slice(0, ROWS)
    if isinstance(vectors, pa.ChunkedArray):
        vectors = vectors.chunk(0)
    most = max(2, min(plan.num_partitions, len(vectors) // 2))
    few = max(1, most // 4)
    slow, fast = _encoding(plan, vectors, most), _encoding(plan, vectors, few)
    # Of a row: what every centroid costs, and all that is the same for any number of them.
    of_centroid = max(0.0, slow - fast) / (most - few)
    compared = plan.num_partitions
    if plan.assign == "fast" and compared >= LEAST_GROUPED:
        compared = max(most, int(compared * PART_OF_GROUPS))
    of_row = slow + of_centroid * (compared - most)
    encode = max(of_row, reading / seen) * plan.num_rows
    train = (
        sample * (reading / seen + of_centroid * _distances(plan.num_partitions, sample)) if sample else 0.0
    )
    codes = max(0.0, fast - of_centroid * few)
    train += min(sample, plan.sample_rate << plan.num_bits) * codes * PASSES_OF_CODEWORDS
    finalize = index / (FINALIZE_BYTES * (os.cpu_count() or 1))
    return {"train": train, "encode": encode, "finalize": finalize}, dropped


def _distances(partitions: int, sample: int) -> float:
    """Centroids that a vector of the sample is compared with in all of the training: `src/encode/cpu/kmeans/partitions.rs`."""
    if partitions <= 128:
        return 12 * partitions
    among_neighbours = 500
    if partitions <= 2048:
        return 0.75 * partitions + among_neighbours
    first = min(partitions, 8192)
    return (
        2 * min(1.0, max(24 * first / sample, 1 / 8 if first == partitions else 0)) * first + among_neighbours
    )


def _encoding(plan: BuildPlan, vectors: pa.FixedSizeListArray, num_partitions: int) -> float:
    """Seconds a row with a model of as many centroids, made up of the vectors themselves."""
    values = vectors.flatten().to_numpy(zero_copy_only=False)
    centroids = vectors.slice(0, num_partitions)
    book = values[: 2**plan.num_bits * plan.dimension]
    book = np.resize(book, 2**plan.num_bits * plan.dimension).astype(values.dtype)
    codebook = pa.FixedSizeListArray.from_arrays(pa.array(book), plan.dimension)
    model = IvfPqModel(centroids, codebook, plan.metric, num_sub_vectors=plan.num_sub_vectors)
    encoder = CpuEncoder(model)
    encoder.encode(vectors.slice(0, 64))
    start = time.perf_counter()
    encoder.encode(vectors)
    return (time.perf_counter() - start) / len(vectors)


def page(plan: BuildPlan) -> str:
    """A plan as a person reads it."""
    guess = plan.estimate
    rows: list[tuple[str, Any]] = [
        ("dataset", f"{plan.dataset_uri} version {plan.version}{f' branch {plan.branch}' if plan.branch else ''}"),
        ("column", f"{plan.column}: {plan.dtype}[{plan.dimension}], {plan.num_rows:,} rows"),
        ("index", f"{plan.name}: {plan.index_type}, {plan.metric}, {plan.mode}"),
        ("partitions", f"{plan.num_partitions:,} ({plan.why['num_partitions']}), about {plan.num_rows / plan.num_partitions:,.0f} rows each"),
        ("codes", f"{plan.pq_code_width} bytes: {plan.num_sub_vectors} sub-vectors ({plan.why['num_sub_vectors']}) of {plan.num_bits} bits"),
        ("shards", f"{len(plan.shards):,} ({plan.why['shards']}), of {len(plan.fragment_ids):,} fragments"),
        ("backend", plan.backend if plan.assign == "exact" else f"{plan.backend}, assign={plan.assign!r}"),
    ]  # fmt: skip
    if guess is not None:
        rows += [
            ("memory", f"at least {_bytes(guess.least_memory)} (memory_limit)"),
            ("disk", f"{_bytes(guess.artifact_bytes)} of artifacts while it is built, {_bytes(guess.index_bytes)} of index"),
            ("traffic", f"{_bytes(guess.bytes_read)} read, {_bytes(guess.bytes_written)} written"),
            ("dropped", f"about {guess.rows_dropped:,} rows without a usable vector"),
        ]  # fmt: skip
        total = sum(guess.seconds.values())
        stages = ", ".join(f"{stage} {_time(seconds)}" for stage, seconds in guess.seconds.items())
        rows.append(
            (
                "time",
                f"about {_time(total)} here: {stages}" if guess.seconds else "not measured",
            )
        )
    width = max(len(what) for what, _ in rows)
    return "\n".join(f"{what:<{width}}  {value}" for what, value in rows)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _time(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
