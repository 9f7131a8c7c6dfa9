"""IVF_PQ vector indexes for stock Lance, built by external encoders.

Importing registers ``accelerator="cuvs"`` and ``precomputed_partition_artifact_uri=`` with pylance's ``create_index``;
`unregister` undoes it. It starts no thread and touches neither network nor GPU.
"""

from __future__ import annotations

from . import _versions as _versions  # first: whether pylance is one that works
from . import backends, exceptions
from ._build_artifact import build_artifact, describe_source
from ._create_index import create_index
from ._finalize import finalize
from ._lance_artifact import (
    Artifact,
    CpuEncoder,
    DeviceArray,
    IvfPqModel,
    PartitionArtifactBuilder,
    VerifyReport,
    __version__,
)
from ._register import register, unregister
from ._scan import PreparedVectors, prepared_vectors
from ._train import train
from .backends import (
    Availability,
    Backend,
    DeviceEncoder,
    DeviceSession,
    Encoder,
    TrainParams,
    available_backends,
)
from .exceptions import (
    ArtifactExistsError,
    ArtifactMismatchError,
    ArtifactNotFoundError,
    BackendUnavailableError,
    ColumnNotFoundError,
    ColumnTypeError,
    CommitConflictError,
    CorruptArtifactError,
    DeviceError,
    DeviceMemoryError,
    IndexExistsError,
    InvalidInputError,
    LanceArtifactError,
    StorageError,
    UnsupportedVersionError,
    UntestedVersionWarning,
)

__all__ = [
    "Artifact",
    "ArtifactExistsError",
    "ArtifactMismatchError",
    "ArtifactNotFoundError",
    "Availability",
    "Backend",
    "BackendUnavailableError",
    "ColumnNotFoundError",
    "ColumnTypeError",
    "CommitConflictError",
    "CorruptArtifactError",
    "CpuEncoder",
    "DeviceArray",
    "DeviceEncoder",
    "DeviceError",
    "DeviceMemoryError",
    "DeviceSession",
    "Encoder",
    "IndexExistsError",
    "InvalidInputError",
    "IvfPqModel",
    "LanceArtifactError",
    "PartitionArtifactBuilder",
    "PreparedVectors",
    "StorageError",
    "TrainParams",
    "UnsupportedVersionError",
    "UntestedVersionWarning",
    "VerifyReport",
    "__version__",
    "available_backends",
    "backends",
    "build_artifact",
    "create_index",
    "describe_source",
    "exceptions",
    "finalize",
    "prepared_vectors",
    "register",
    "train",
    "unregister",
]

register()
