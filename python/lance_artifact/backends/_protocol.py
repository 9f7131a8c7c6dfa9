"""What a backend and an encoder are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    import lance
    import pyarrow as pa

    from .._lance_artifact import Artifact, DeviceArray, IvfPqModel


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


class DeviceSession(Protocol):
    """An encoder at work on one device. All calls come from one thread, in which that device is current."""

    def encode(self, vectors: DeviceArray, part_id: DeviceArray, pq_code: DeviceArray) -> None:
        """Put the encoding of ``n`` vectors on the session's stream, or finish it.

        Parameters
        ----------
        vectors : (n, dimension) of the encoder's input_dtype
            Finite, of unit norm for cosine. They are there already, on any stream, and stay until what the call put on the
            session's stream is done; so do the outputs.
        part_id : (n,) uint32
            Written.
        pq_code : (n, pq_code_width) uint8
            Written.

        Raises
        ------
        MemoryError
            The device is out of memory: the call is repeated with fewer rows.
        """
        ...

    def close(self) -> None:
        """Finish and release everything; also called after errors."""
        ...


@runtime_checkable
class DeviceEncoder(Encoder, Protocol):
    """An encoder that computes on CUDA devices: it is fed by asynchronous copies, several batches in flight.

    Attributes
    ----------
    input_dtype : {"float16", "float32"}
        What it takes; float64 columns are narrowed to float32 on their way.
    devices : sequence of int
        Where it computes; they share the rows.
    """

    input_dtype: str
    devices: Sequence[int]

    def open(self, device: int, stream: int) -> DeviceSession:
        """Get ready on a device, which is current in the calling thread, to compute on ``stream`` (a ``cudaStream_t``)."""
        ...


@runtime_checkable
class Backend(Protocol):
    """Trains models and makes encoders.

    Attributes
    ----------
    name : str
        How users call it.

    Notes
    -----
    What a backend may have beside this is looked for by its name, and used where it is:

    ``takes_any_order = True``
        `train` needs no random order. The sample then comes in the table's, which spares a copy of it.
    ``check_fits(params, dimension)``
        Called before a sample is drawn; raises where what `train` needs at least cannot be held.
    ``on_devices(devices)``, ``within_device_memory(device_memory_limit)``
        The same backend on these devices, or in so many bytes of each. Without them the arguments of these names are refused.
    ``resumable = False``
        It encodes only with models that it has trained in the same process: a run is refused before it is begun.
    ``train_centroids(sample, params, progress=None)``
        Centroids alone, (num_partitions, dimension) of the sample's dtype, of as few vectors as there are of them: for
        ``IndicesBuilder.train_ivf``. Without it that trains a codebook beside them, which needs 256 vectors.
    ``check_target(artifact_uri)``
        Of a `DatasetBackend`: called before it trains; raises where its artifact cannot be written.
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


@runtime_checkable
class DatasetBackend(Backend, Protocol):
    """A backend that reads the dataset itself and writes a whole artifact: its artifact is finalized as it is."""

    def train_on_dataset(
        self, dataset: lance.LanceDataset, column: str, params: TrainParams, fragment_ids: list[int] | None
    ) -> IvfPqModel:
        """Train on the rows of a dataset at the version of its handle."""
        ...

    def write_artifact(
        self,
        dataset: lance.LanceDataset,
        column: str,
        model: IvfPqModel,
        artifact_uri: str | Path,
        fragment_ids: list[int] | None,
    ) -> Artifact:
        """Encode the dataset with a model that this backend trained."""
        ...
