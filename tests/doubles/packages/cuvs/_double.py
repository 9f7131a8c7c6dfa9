"""The arithmetic, and what tests can make go wrong."""

import threading

import numpy as np
from rmm import mr

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
        # Distances as the real one sums them: squares and products, in float32.
        self.expanded = False
        # And rounded to TF32 before, where both rows and centers are fewer than this.
        self.tf32_below = 0
        # cuBLAS had no memory for its handle: whoever has such resources fails from then on.
        self.no_handle_at = None
        self.broken = set()
        # Memory resources that trainings met, and codebooks trained on host memory.
        self.trained_in = []
        self.pageable = 0
        # And devices and their memory resources that encodings met.
        self.encoded_in = set()
        # Encodings are there when the stream comes to them; the real one waits for them itself so far.
        self.put_off = False
        # A fault of the device: every call fails with it from then on.
        self.fault = None

    def take(self, rows, dimension, resources=None):
        """A call on so many vectors, and what it needs."""
        with self.lock:
            self.calls += 1
            calls = self.calls
        if self.fault:
            raise CuvsException(self.fault)
        handle = resources and resources.get_c_obj()
        if self.no_handle_at == calls:
            self.broken.add(handle)
        if handle in self.broken:
            raise CuvsException(
                "cuBLAS error encountered at: file=double: call='cublasGemmEx', Reason=1:CUBLAS_STATUS_NOT_INITIALIZED"
            )
        if self.delay:
            self.delay()
        if self.most_rows is not None and rows > self.most_rows:
            raise CuvsException(
                "std::bad_alloc: out_of_memory: CUDA error (failed to allocate 1 bytes) at: double: cudaErrorMemoryAllocation out of memory"
            )
        if self.fail_at == calls:
            self.fault = self.message
            raise CuvsException(self.message)
        pool = mr.get_current_device_resource()
        try:
            pool.used((8 if resources else 5) * rows * dimension)
        except RuntimeError as error:
            raise CuvsException(str(error)) from None
        if resources:
            self.encoded_in.add((mr.device(), getattr(pool, "of_device", None)))
        else:
            self.trained_in.append(pool)
        self.rows.append(rows)


CONTROL = Control()


def nearest(vectors, centers):
    """The L2-nearest center of each vector; sums in float64, so that only true ties depend on rounding, unless they are to be as
    the real one's."""
    rounded = max(len(vectors), len(centers)) < CONTROL.tf32_below
    if CONTROL.expanded or rounded:
        vectors, centers = vectors.astype(np.float32), centers.astype(np.float32)
        squares = (vectors**2).sum(1, keepdims=True) + (centers**2).sum(1)[None]
        if rounded:
            vectors, centers = tf32(vectors), tf32(centers)
        return (squares - np.float32(2) * (vectors @ centers.T)).argmin(1).astype(np.uint32)
    vectors, centers = vectors.astype(np.float64), centers.astype(np.float64)
    blocks = [
        ((centers**2).sum(1)[None] - 2 * vectors[i : i + 4096] @ centers.T).argmin(1)
        for i in range(0, len(vectors), 4096)
    ]
    return np.concatenate(blocks).astype(np.uint32) if blocks else np.zeros(0, np.uint32)


def tf32(values):
    """Numbers with 10 bits after the point."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)


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
