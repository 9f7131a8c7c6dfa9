"""Training with cuVS: of a sample that the device holds, and of one that it holds only parts of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from .._lance_artifact import _Means
from .._log import LOGGER
from ..exceptions import InvalidInputError
from ._cuvs_calls import Cuvs, FirstRows, smallest_codebook, smallest_quantizer
from ._protocol import TrainParams
from ._vectors import directions_of, spread

# Bytes of a sample's parts, as float32.
PART_BYTES = 256 << 20
# How often the centroids of a part of the sample are moved to the means of all of it: iterations, as any others.
MOVES = 2


class Trainer:
    """The trainings of one sample, float16 or float32, which lies in host memory in any order.

    Of it ``at_once`` vectors may be on the device. Where it has more, centroids are trained on so many of them and moved to the means of
    all, which go through the device in parts.
    """

    def __init__(
        self,
        library: Cuvs,
        device: int,
        sample: np.ndarray,
        params: TrainParams,
        report: Any,
        at_once: int,
        not_counted: str = "",
    ) -> None:
        self.library, self.device, self.sample, self.params = library, device, sample, params
        self.report, self.at_once, self.not_counted = report, at_once, not_counted
        self.spherical = params.metric == "dot"
        self.dimension = sample.shape[1]
        self.resources, _ = library.resources()

    @contextlib.contextmanager
    def _stage(self, name: str, total: int | None = None) -> Iterator[None]:
        # cuVS does not say how far it is.
        self.report("start", name, 0, total, "rows" if total else "")
        yield
        self.report("complete", name, 0, None, "")

    def train(self) -> tuple[np.ndarray, np.ndarray]:
        """Centroids, and the codebook of residuals; for dot centroids of unit norm, and the codebook of raw vectors."""
        if self.spherical or len(self.sample) > self.at_once:
            centroids = self._centroids()
            return centroids, self._codebook_for(centroids)
        p = self.params
        with self._stage("train_ivf"):
            index = self.library.train(
                self.sample, p.num_partitions, p.num_sub_vectors, p.num_bits, p.max_iters, p.sample_rate
            )
        with self._stage("train_quantizer"):
            return self.library.centroids_of(index), self.library.codebook_of(index)

    def codebook_only(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The codebook for given centroids, beside them."""
        return centroids, self._codebook_for(centroids.astype(np.float32))

    def centroids_only(self) -> tuple[np.ndarray, np.ndarray]:
        """Centroids without a codebook: an empty one beside them."""
        return self._centroids(), np.empty(0, np.float32)

    def _centroids(self) -> np.ndarray:
        p, whole = self.params, len(self.sample) <= self.at_once
        if self.spherical:
            # Vectors of zero norm have no direction.
            part = directions_of(self.sample, self.at_once)
            if len(part) < p.num_partitions:
                raise InvalidInputError(
                    f"training: {len(part)} vectors of non-zero norm, expected at least num_partitions = {p.num_partitions}"
                )
        else:
            part = spread(self.sample, self.at_once)
        if not whole:
            LOGGER.warning(
                "training centroids on %d vectors, and moving them to the means of %d, which come in parts: more do not fit the device's "
                "memory%s",
                len(part),
                len(self.sample),
                self.not_counted,
            )
        moves = 0 if whole else min(MOVES, p.max_iters - 1)
        sub_vectors, bits = smallest_quantizer(self.dimension)
        # Of the same vectors several times over the centroids are the same, and the codebook, which nobody reads, gets its codes.
        if len(part) < 1 << bits:
            part = np.tile(part, (-(-(1 << bits) // len(part)), 1))
        with self._stage("train_ivf"):
            index = self.library.train(part, p.num_partitions, sub_vectors, bits, p.max_iters - moves, 64)
            centroids = self._in_place(self.library.centroids_of(index))
            del index, part
        if moves:
            with self._stage("refine_ivf", moves * len(self.sample)):
                for move in range(moves):
                    centroids = self._in_place(self._moved(centroids, move * len(self.sample)))
        return centroids

    def _in_place(self, centroids: np.ndarray) -> np.ndarray:
        if not self.spherical:
            return centroids
        lengths = np.linalg.norm(centroids, axis=1, keepdims=True)
        unit: np.ndarray = centroids / np.maximum(lengths, np.finfo(np.float32).tiny)
        return unit

    def _moved(self, centroids: np.ndarray, done: int) -> np.ndarray:
        """Centroids at the means of the sample's vectors that are nearest to them."""
        rows = max(1, min(self.at_once // 4, PART_BYTES // (4 * self.dimension)))
        means = _Means(*centroids.shape)
        nearest = _Nearest(self, centroids, min(rows, len(self.sample)))
        # A part is added up while the next is on the device.
        with ThreadPoolExecutor(1) as others:
            adding: Future[None] | None = None
            for start in range(0, len(self.sample), rows):
                part = self.sample[start : start + rows]
                part = directions_of(part) if self.spherical else np.ascontiguousarray(part)
                # Of zeros there is none.
                if not len(part):
                    continue
                labels = nearest.of(part)
                if adding is not None:
                    adding.result()
                adding = others.submit(means.add, _as_list(part), pa.array(labels))
                self.report("progress", "refine_ivf", done + start + len(part), None, "rows")
            if adding is not None:
                adding.result()
        moved = means.moved(_as_list(centroids))
        values: np.ndarray = moved.flatten().to_numpy().reshape(centroids.shape)
        return values

    def _codebook_for(self, centroids: np.ndarray) -> np.ndarray:
        """Of residuals to the nearest centroid, or of raw vectors for dot."""
        p = self.params
        # The first rows are what cuVS trains on: they must be from all over.
        vectors = spread(self.sample, min(p.sample_rate << p.num_bits, self.at_once))
        values = vectors.astype(np.float32, copy=False)
        if not self.spherical:
            vectors = np.ascontiguousarray(vectors)
            values = values - centroids[_Nearest(self, centroids, len(vectors)).of(vectors)]
        with self._stage("train_quantizer"):
            return self.library.train_codebook(
                values, p.num_sub_vectors, p.num_bits, p.max_iters, p.sample_rate
            )


class _Nearest:
    """Finds the nearest centroid of up to ``rows`` vectors at a time, on the device."""

    def __init__(self, trainer: Trainer, centroids: np.ndarray, rows: int) -> None:
        self._library, self._resources = trainer.library, trainer.resources
        self._index = self._library.index(
            np.ascontiguousarray(centroids, np.float32),
            smallest_codebook(trainer.dimension),
            self._resources,
            trainer.device,
        )
        self._labels = self._library.empty((rows,), np.uint32)
        self._unused = self._library.empty((rows, 1), np.uint8)

    def of(self, vectors: np.ndarray) -> np.ndarray:
        rows = len(vectors)
        labels, unused = (FirstRows(array, rows) for array in (self._labels, self._unused))
        self._index.transform(self._library.to_device(vectors), labels, unused, self._resources)
        self._resources.sync()
        found: np.ndarray = self._labels.copy_to_host()[:rows]
        return found


def _as_list(vectors: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
