"""IVF_PQ vector indexes for stock Lance, built by external encoders.

Importing registers ``accelerator="cuvs"`` and ``precomputed_partition_artifact_uri=`` with pylance's ``create_index``;
`unregister` undoes it. It starts no thread and touches neither network nor GPU.
"""

from __future__ import annotations

from . import _versions as _versions  # first: whether pylance is one that works
from . import backends, exceptions
from ._build_artifact import build_artifact, describe_source
from ._build_segment import build_segment
from ._cancel import cancel_on, in_thread
from ._clean import Leftover, clean_run
from ._create_index import create_index
from ._estimate import Estimate
from ._evaluate import Evaluation, Setting, evaluate
from ._extend import Extension, extend_index
from ._finalize import finalize
from ._fit import ModelFit
from ._lance_artifact import (
    Artifact,
    CpuEncoder,
    DeviceArray,
    IvfPqModel,
    PartitionArtifactBuilder,
    VerifyReport,
    __version__,
)
from ._merge import Merge, merge_segments
from ._plan import BuildPlan, Shard, plan
from ._register import register, unregister
from ._resume import resume_run
from ._run import Run
from ._run_files import RunStatus
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
    CancelledError,
    ColumnNotFoundError,
    ColumnTypeError,
    CommitConflictError,
    CorruptArtifactError,
    DeviceError,
    DeviceMemoryError,
    IndexExistsError,
    InvalidInputError,
    InvalidTypeError,
    LanceArtifactError,
    StorageError,
    UnsupportedError,
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
    "BuildPlan",
    "CancelledError",
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
    "Estimate",
    "Evaluation",
    "Extension",
    "IndexExistsError",
    "InvalidInputError",
    "InvalidTypeError",
    "IvfPqModel",
    "LanceArtifactError",
    "Leftover",
    "Merge",
    "ModelFit",
    "PartitionArtifactBuilder",
    "PreparedVectors",
    "Run",
    "RunStatus",
    "Setting",
    "Shard",
    "StorageError",
    "TrainParams",
    "UnsupportedError",
    "UnsupportedVersionError",
    "UntestedVersionWarning",
    "VerifyReport",
    "__version__",
    "available_backends",
    "backends",
    "build_artifact",
    "build_segment",
    "cancel_on",
    "clean_run",
    "create_index",
    "describe_source",
    "evaluate",
    "exceptions",
    "extend_index",
    "finalize",
    "in_thread",
    "merge_segments",
    "plan",
    "prepared_vectors",
    "register",
    "resume_run",
    "train",
    "unregister",
]

register()
