"""What a backend and an encoder are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import pyarrow as pa

    from .._lance_artifact import IvfPqModel


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here.

    Attributes
    ----------
    ok : bool
    missing : tuple of str
        What is not there ("package", "driver", "device", ...), each with how to get it.
    details : dict
        What is there: versions, devices.
    """

    ok: bool
    missing: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainParams:
    """Training parameters; they mean what they mean in pylance.

    Attributes
    ----------
    metric : {"l2", "cosine", "dot"}
        Cosine samples are normalised already: train them as L2.
    num_partitions, num_sub_vectors : int
    num_bits : {4, 8}
    sample_rate : int
        Training vectors per centroid and per codeword.
    max_iters : int
    seed : int
    ivf_centroids : pyarrow.FixedSizeListArray or None
        Given centroids: train the codebook for them.
    """

    metric: str
    num_partitions: int
    num_sub_vectors: int
    num_bits: int = 8
    sample_rate: int = 256
    max_iters: int = 50
    seed: int = 0
    ivf_centroids: pa.FixedSizeListArray | None = None


@runtime_checkable
class Encoder(Protocol):
    """A trained backend, ready to encode."""

    def encode(self, vectors: pa.FixedSizeListArray) -> tuple[Any, Any]:
        """Encode ``n`` prepared vectors: finite, of unit norm for cosine, of the model's dtype.

        Returns
        -------
        part_id : (n,) uint32
            A numpy or Arrow array.
        pq_code : (n, pq_code_width) uint8
            A numpy array or an Arrow fixed_size_list.
        """
        ...


@runtime_checkable
class Backend(Protocol):
    """Trains models and makes encoders.

    Attributes
    ----------
    name : str
        How users call it.
    """

    name: str

    def availability(self) -> Availability:
        """Look for packages, drivers and devices; starts none of them."""
        ...

    def train(self, sample: pa.FixedSizeListArray, params: TrainParams, progress: Any = None) -> IvfPqModel:
        """Train on prepared vectors in random order. The model has the sample's dtype.

        ``progress`` is None or called as ``progress(event, stage, completed, total, unit)``.
        """
        ...

    def encoder(self, model: IvfPqModel) -> Encoder:
        """An encoder for a model, its own or anybody's."""
        ...
