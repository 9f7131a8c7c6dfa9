"""Backends: who trains and encodes. One file each; others register under the entry-point group `lance_artifact.backends`."""

from __future__ import annotations

from ._protocol import (
    Availability,
    Backend,
    DatasetBackend,
    DeviceEncoder,
    DeviceSession,
    Encoder,
    TrainParams,
)
from ._registry import available_backends, check_resumable, resolve_accelerator, resolve_backend

__all__ = [
    "Availability",
    "Backend",
    "DatasetBackend",
    "DeviceEncoder",
    "DeviceSession",
    "Encoder",
    "TrainParams",
    "available_backends",
    "check_resumable",
    "resolve_accelerator",
    "resolve_backend",
]
