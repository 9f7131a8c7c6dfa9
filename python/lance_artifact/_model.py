"""Arrays in every form that pylance takes, as the one form that the extension takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from ._lance_artifact import IvfPqModel
from .exceptions import InvalidInputError, InvalidTypeError


def as_fixed_size_list(value: Any) -> pa.FixedSizeListArray:
    """A fixed-size list of a numpy array (the last axis is a row), or of what pyarrow takes for an array.

    Called by the extension for objects without ``__arrow_c_array__``.
    """
    if isinstance(value, pa.ChunkedArray):
        value = value.combine_chunks()
        return value.chunk(0) if isinstance(value, pa.ChunkedArray) else value
    try:
        array = np.asarray(value)
    except Exception as error:
        # Ragged lists, tensors on a device, objects with an array interface that fails.
        raise InvalidInputError(
            f"got {type(value).__name__}, expected an array of floats: {error}"
        ) from error
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise InvalidTypeError(f"got an array of {array.dtype}, expected float16, float32 or float64")
    if array.ndim < 2 or array.shape[-1] == 0:
        raise InvalidInputError(
            f"got an array of shape {array.shape}, expected (num_partitions, dimension) for centroids or "
            "(num_sub_vectors, 2**num_bits, dimension // num_sub_vectors) for a codebook"
        )
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(array).reshape(-1)), array.shape[-1]
    )


def _unpickle_model(
    centroids: Any, codebook: Any, metric: str, num_sub_vectors: int, training: dict[str, int] | None = None
) -> IvfPqModel:
    model = IvfPqModel(centroids, codebook, metric, num_sub_vectors=num_sub_vectors)
    return model.with_training(**training) if training else model
