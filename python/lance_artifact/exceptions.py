"""The exceptions of lance_artifact. Each is a `LanceArtifactError` and the built-in exception that fits."""

from __future__ import annotations

__all__ = [
    "ArtifactExistsError",
    "ArtifactMismatchError",
    "ArtifactNotFoundError",
    "BackendUnavailableError",
    "CancelledError",
    "ColumnNotFoundError",
    "ColumnTypeError",
    "CommitConflictError",
    "CorruptArtifactError",
    "DeviceError",
    "DeviceMemoryError",
    "IndexExistsError",
    "InvalidInputError",
    "InvalidTypeError",
    "LanceArtifactError",
    "StorageError",
    "UnsupportedError",
    "UnsupportedVersionError",
    "UntestedVersionWarning",
]


class LanceArtifactError(Exception):
    """Base of every error raised here; raised itself only for a defect, which is worth a report, and for
    work that is cut off because the interpreter ends."""


class InvalidInputError(LanceArtifactError, ValueError):
    """An argument or a batch cannot be used. Nothing was changed."""


class InvalidTypeError(InvalidInputError, TypeError):
    """An argument is of a type that cannot be used, or is no argument (a `TypeError` too, as pylance raises it)."""


class UnsupportedError(InvalidInputError, NotImplementedError):
    """An index type, a number of bits or an option that is not built here (a `NotImplementedError`, and so a `RuntimeError`, too, as
    pylance raises them)."""


class CancelledError(LanceArtifactError):
    """The call was cancelled by `cancel_on`. What it had written is removed, and nothing is committed."""


class ColumnNotFoundError(LanceArtifactError, KeyError):
    """The dataset has no such column (a `KeyError`, as pylance raises it)."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ColumnTypeError(LanceArtifactError, TypeError):
    """The column holds no vectors of floats (a `TypeError`, as pylance raises it)."""


class ArtifactNotFoundError(LanceArtifactError, FileNotFoundError):
    """There is no finished artifact at the given place."""


class ArtifactExistsError(LanceArtifactError, FileExistsError):
    """The target holds an artifact and `overwrite` is False, or another writer has published there meanwhile."""


class CorruptArtifactError(LanceArtifactError, ValueError):
    """The artifact breaks a promise that its manifest makes."""


class ArtifactMismatchError(LanceArtifactError, ValueError):
    """The artifact is sound but does not fit the dataset, the column or the model."""


class BackendUnavailableError(LanceArtifactError, RuntimeError):
    """The backend cannot run here; the message says what is missing and how to get it."""


class DeviceError(LanceArtifactError, RuntimeError):
    """A device failed in the middle of work: it is lost, or its driver refused a call. Nothing was committed."""


class DeviceMemoryError(DeviceError, MemoryError):
    """A device has too little free memory, even for the smallest batch."""


class IndexExistsError(LanceArtifactError, RuntimeError):
    """An index of that name exists and `replace` is False (a `RuntimeError`, as pylance raises it)."""


class CommitConflictError(LanceArtifactError, RuntimeError):
    """The dataset changed so that the index cannot be committed, or would cover less than it should."""


class StorageError(LanceArtifactError, OSError):
    """Reading or writing failed: disk, network, permissions."""


class UnsupportedVersionError(LanceArtifactError, ImportError):
    """pylance is a release with which this package cannot work; raised when it is imported. LanceDB: raised where a table of it is used."""


class UntestedVersionWarning(UserWarning):
    """pylance, or LanceDB, is a release with which this package was not tested, of a series that should work."""
