"""The arithmetic, and what tests can make go wrong."""

import threading

import numpy as np

from cuvs.common.exceptions import CuvsException


class Control:
    """Faults for tests."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.most_rows = None
        self.fail_at = None
        self.message = (
            "CUDA error encountered at: file=double: cudaErrorLaunchFailure unspecified launch failure"
        )
        self.calls = 0
        self.rotation = None
        self.delay = None
        self.lock = threading.Lock()
        self.rows = []

    def take(self, rows):
        with self.lock:
            self.calls += 1
            calls = self.calls
        if self.delay:
            self.delay()
        if self.most_rows is not None and rows > self.most_rows:
            raise CuvsException(
                "std::bad_alloc: out_of_memory: CUDA error (failed to allocate 1 bytes) at: double: cudaErrorMemoryAllocation out of memory"
            )
        if self.fail_at == calls:
            raise CuvsException(self.message)
        self.rows.append(rows)


CONTROL = Control()


def nearest(vectors, centers):
    """The L2-nearest center of each vector; sums in float64, so that only true ties depend on rounding."""
    vectors, centers = vectors.astype(np.float64), centers.astype(np.float64)
    blocks = [
        ((centers**2).sum(1)[None] - 2 * vectors[i : i + 4096] @ centers.T).argmin(1)
        for i in range(0, len(vectors), 4096)
    ]
    return np.concatenate(blocks).astype(np.uint32) if blocks else np.zeros(0, np.uint32)


def kmeans(vectors, clusters, iterations):
    rng = np.random.default_rng(0)
    centers = vectors[rng.choice(len(vectors), clusters, replace=len(vectors) < clusters)].astype(np.float32)
    for _ in range(min(iterations, 10)):
        labels = nearest(vectors, centers)
        for label in range(clusters):
            chosen = vectors[labels == label]
            if len(chosen):
                centers[label] = chosen.mean(0, dtype=np.float64)
    return centers


def encode(residuals, pq_centers, bits):
    """(rows, bytes) codes; pq_centers (pq_dim, pq_len, book)."""
    pq_dim, width, _ = pq_centers.shape
    codes = np.stack(
        [nearest(residuals[:, m * width : (m + 1) * width], pq_centers[m].T) for m in range(pq_dim)], 1
    )
    codes = codes.astype(np.uint8)
    return codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
