"""Vectors and models as numpy arrays, and as a library that only knows L2 is to see them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._lance_artifact import IvfPqModel
from ..exceptions import InvalidInputError

# Rows that are normalised at a time.
NORMALISED_ROWS = 8192


def as_matrix(vectors: Any) -> np.ndarray:
    """A fixed-size list without nulls as (rows, dimension), without a copy."""
    matrix: np.ndarray = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, vectors.type.list_size)
    return matrix


def narrowed(vectors: np.ndarray) -> np.ndarray:
    """Vectors as a GPU computes with them: float16 as it is, others as float32."""
    with np.errstate(over="ignore"):
        computed = vectors if vectors.dtype == np.float16 else vectors.astype(np.float32, copy=False)
    if vectors.dtype == np.float64 and not np.isfinite(computed).all():
        raise InvalidInputError(
            "a vector of the float64 column has an element beyond the range of float32, in which this backend computes; "
            'use backend="cpu", or remove the vector'
        )
    return computed


def codebook_array(model: IvfPqModel) -> np.ndarray:
    """(num_sub_vectors, 2**num_bits, dimension // num_sub_vectors)."""
    width = model.dimension // model.num_sub_vectors
    return as_matrix(model.pq_codebook).reshape(model.num_sub_vectors, 2**model.num_bits, width)


def spread(vectors: np.ndarray, rows: int) -> np.ndarray:
    """So many rows from all over; all of them as they are, if they are no more."""
    return vectors if len(vectors) <= rows else vectors[np.arange(rows) * len(vectors) // rows]


def directions_of(vectors: np.ndarray, rows: int | None = None) -> np.ndarray:
    """Float32 of unit norm, without those of zero norm, which have no direction; of ``rows`` from all over, as `spread` takes them.

    Takes the memory of the result.
    """
    count = len(vectors) if rows is None else min(rows, len(vectors))
    directions = np.empty((count, vectors.shape[1]), np.float32)
    kept = 0
    for start in range(0, count, NORMALISED_ROWS):
        chosen: Any = np.arange(start, min(start + NORMALISED_ROWS, count)) * len(vectors) // count
        block = vectors[chosen].astype(np.float32, copy=False)
        norms = np.linalg.norm(block, axis=1, keepdims=True)
        block = block[norms[:, 0] > 0] / norms[norms[:, 0] > 0]
        directions[kept : kept + len(block)] = block
        kept += len(block)
    return directions[:kept]


def of_equal_norm(centroids: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Centroids for dot as cuVS is to compare them, by L2.

    Of equal norm in float32, because what rounding to the column's type did to their norms would decide for short vectors; and as long
    as vectors are, as the codewords tell: of sums of numbers of very different size little is left.
    """
    norms = np.linalg.norm(centroids.astype(np.float64), axis=1, keepdims=True)
    length = float(np.sqrt((codebook.astype(np.float64) ** 2).sum(2).mean(1).sum()))
    scale = length if np.isfinite(length) and length > 0 else 1.0
    scaled: np.ndarray = (centroids / np.where(norms > 0, norms, 1) * scale).astype(np.float32)
    return scaled
