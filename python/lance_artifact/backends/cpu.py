"""The embedded CPU backend: always there, and the oracle for the others."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .._lance_artifact import CpuEncoder, IvfPqModel, train_on_cpu
from ._protocol import Availability, TrainParams

if TYPE_CHECKING:
    import pyarrow as pa


class CpuBackend:
    """Trains and encodes in the extension, on all cores. The same seed and sample give the same model."""

    name = "cpu"

    def availability(self) -> Availability:
        """Always available."""
        return Availability(True, details={"cores": os.cpu_count()})

    def train(self, sample: pa.FixedSizeListArray, params: TrainParams, progress: Any = None) -> IvfPqModel:
        """Train centroids and codebook; see `Backend.train`."""
        return train_on_cpu(
            sample,
            params.metric,
            num_partitions=params.num_partitions,
            num_sub_vectors=params.num_sub_vectors,
            num_bits=params.num_bits,
            sample_rate=params.sample_rate,
            max_iters=params.max_iters,
            seed=params.seed,
            ivf_centroids=params.ivf_centroids,
            progress=progress,
        )

    def encoder(self, model: IvfPqModel) -> CpuEncoder:
        """An exact encoder for any model."""
        return CpuEncoder(model)
