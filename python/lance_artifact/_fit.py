"""How well the model of an index fits rows that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ._lance_artifact import CpuEncoder, IvfPqModel, _VectorSource
from .exceptions import InvalidInputError

# Vectors that are looked at on each side: the means are then good to some percent.
SAMPLE = 4096

# New rows whose error is so many times that of the others are found less often (docs/performance.md says what was measured).
WORN = 1.5


@dataclass(frozen=True)
class ModelFit:
    """How well an index's model fits rows that came since it was trained, on samples of both.

    Attributes
    ----------
    old_residual, new_residual : float
        Mean squared distance of a vector from its partition's centroid: rows that were indexed before, and new ones.
    old_error, new_error : float
        Mean squared distance of a vector from what its code stands for.
    old_skew, new_skew : float
        Rows of the fullest partition over the mean of all, before and after.
    """

    old_residual: float
    new_residual: float
    old_error: float
    new_error: float
    old_skew: float
    new_skew: float

    @property
    def ratio(self) -> float:
        """The larger of new over old residual and error: 1 where the model fits new rows as well, infinite (null in the
        command's JSON) where it has no error on the old ones alone."""
        pairs = ((self.new_residual, self.old_residual), (self.new_error, self.old_error))
        return max((new / old if old > 0 else (1.0 if new == 0 else float("inf"))) for new, old in pairs)

    @property
    def rebuild(self) -> str | None:
        """Why an index with a model trained anew would be better; None where it would not."""
        if self.ratio > WORN:
            return f"the model fits the new rows {self.ratio:.2f} times worse than those it was trained on: searches find fewer of them"
        if self.new_skew > 2 * max(self.old_skew, 2.0):
            return f"the fullest partition has {self.new_skew:.1f} times the mean, {self.old_skew:.1f} before: searches read more rows"
        return None

    def __str__(self) -> str:
        advice = f"a new index pays: {self.rebuild}" if self.rebuild else "the model fits the new rows"
        return (
            f"residual {self.old_residual:.4g} -> {self.new_residual:.4g}, error {self.old_error:.4g} -> {self.new_error:.4g}, "
            f"fullest partition {self.old_skew:.1f} -> {self.new_skew:.1f} times the mean; {advice}"
        )


def errors(model: IvfPqModel, encoder: CpuEncoder, source: _VectorSource) -> tuple[float, float] | None:
    """Mean squared residual and error of a sample of the rows; None where none of them has a usable vector."""
    try:
        sample = source.sample(min(SAMPLE, source.count_rows()), model.metric, 0)
    except InvalidInputError:
        return None
    if len(sample) == 0:
        return None
    part_id, pq_code = encoder.encode(sample)
    vectors = _rows(sample)
    residual = vectors - _rows(model.ivf_centroids)[np.asarray(part_id)]
    # Codes of dot stand for the vectors themselves.
    encoded = vectors if model.metric == "dot" else residual
    error = encoded - decoded(model, pq_code)
    return float(np.square(residual).sum(axis=1).mean()), float(np.square(error).sum(axis=1).mean())


def decoded(model: IvfPqModel, pq_code: pa.FixedSizeListArray) -> np.ndarray:
    """What codes stand for, as (rows, dimension) of float32."""
    codes = pq_code.flatten().to_numpy(zero_copy_only=False).reshape(len(pq_code), -1)
    if model.num_bits == 4:
        # Two to a byte, the first one low.
        codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), -1)
    book = _values(model.pq_codebook).reshape(model.num_sub_vectors, 2**model.num_bits, -1)
    parts = [book[m, codes[:, m]] for m in range(model.num_sub_vectors)]
    return np.concatenate(parts, axis=1)


def _values(array: pa.FixedSizeListArray) -> np.ndarray:
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)


def _rows(array: pa.FixedSizeListArray) -> np.ndarray:
    return _values(array).reshape(len(array), -1)


def skew(sizes: np.ndarray) -> float:
    """Rows of the fullest partition over the mean."""
    mean = sizes.mean() if len(sizes) else 0.0
    return float(sizes.max() / mean) if mean > 0 else 1.0
