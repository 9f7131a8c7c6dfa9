"""The user's pylance handle: what of it the extension needs, and the checks that pylance makes of a column."""

from __future__ import annotations

import copy
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import lance
import pyarrow as pa

from ._checked import nearest, refuse_type
from ._lance_artifact import _Dataset, _VectorSource, shown_uri, without_secrets
from ._lancedb import MANAGED, Table, table_of
from ._says import lance_says
from .exceptions import (
    ArtifactMismatchError,
    ColumnNotFoundError,
    ColumnTypeError,
    InvalidInputError,
    InvalidTypeError,
    StorageError,
    UnsupportedError,
)

T = TypeVar("T")

# Seconds to wait for another thread that uses the same handle.
BORROWED_SECONDS = 30.0


@dataclass(frozen=True)
class Handle:
    """A dataset at a version, read by pylance and by the extension, which has found both to be the same.

    Attributes
    ----------
    user : lance.LanceDataset
        The caller's handle, which is to see what is committed.
    dataset : lance.LanceDataset
        A handle of our own: other threads may use the caller's meanwhile.
    core : _Dataset
        The same version, branch and files, opened by the extension.
    location : str
        Absolute; of the dataset or of the branch, as the user's handle has it.
    table : Table or None
        The LanceDB table that was given in place of a dataset, which is to see what is committed too.
    """

    user: lance.LanceDataset
    dataset: lance.LanceDataset
    core: _Dataset
    location: str
    table: Table | None = None

    @classmethod
    def of(cls, dataset: Any, *, commits: bool = False) -> Handle:
        """Of what a caller gave; ``commits``: for a call that is to commit, and then brings it to the latest version.

        Raises
        ------
        InvalidInputError
            Among others: it is a LanceDB table at a version that was checked out, which LanceDB does not change either.
        """
        table = table_of(dataset)
        if commits and table is not None:
            table.check_follows()
        user = _as_lance(dataset if table is None else table.dataset())
        return cls._open(user, patient(lambda: copy.copy(user)), _location(user), table)

    @classmethod
    def _open(
        cls, user: lance.LanceDataset, dataset: lance.LanceDataset, location: str, table: Table | None
    ) -> Handle:
        internals: Any = dataset
        options = dataset.latest_storage_options()
        core = _Dataset(
            location,
            internals._ds.serialized_manifest(),
            storage_options=dict(options) if options else None,
            # A handle of our own, so that it can be asked whatever becomes of the user's.
            renew=dataset.latest_storage_options if options else None,
            base_storage_options=internals._base_store_params or None,
        )
        return cls(user, dataset, core, location, table)

    @property
    def uri(self) -> str:
        """Without credentials; of the branch."""
        return self.core.uri

    @property
    def root(self) -> str:
        """Without credentials; of the dataset, where the handle is on a branch."""
        return self.uri.removesuffix(f"/tree/{self.core.branch}") if self.core.branch else self.uri

    @property
    def version(self) -> int:
        return self.core.version

    def at(self, version: int) -> Handle:
        """The same dataset and branch at another version, with the session and namespace of the user's handle."""
        if version == self.version:
            return self
        try:
            dataset = self.dataset.checkout_version(version)
        except (OSError, ValueError) as error:
            raise InvalidInputError(
                f"dataset {self.uri}: version {version}, from which the artifact was encoded, cannot be opened "
                f"({error}); it may have been cleaned up: tag versions that long builds read"
            ) from error
        return self._open(self.user, dataset, _location(self.user), self.table)

    def latest(self) -> lance.LanceDataset:
        """A handle of our own at the latest version of the branch."""
        with readable(f"the latest version of {self.uri}"):
            latest = copy.copy(self.dataset)
            cast(Any, latest).checkout_latest()
            return latest

    def reopen(self, version: int | None) -> lance.LanceDataset:
        """A version of the branch (None: the latest) as it is in the store now, with no memory of what was there before."""
        branch = self.core.branch
        root = self.location.removesuffix(f"/tree/{branch}") if branch else self.location
        with readable(f"{'the latest version' if version is None else f'version {version}'} of {self.uri}"):
            fresh = lance.dataset(root, storage_options=self.dataset.latest_storage_options())
            return fresh if not branch and version is None else fresh.checkout_version((branch, version))

    def refresh(self) -> None:
        """Let the user's handle see what was committed. It is committed, whatever becomes of the handle."""
        try:
            patient(lambda: cast(Any, self.user).checkout_latest())
            if self.table is not None:
                self.table.refresh()
        except (RuntimeError, OSError, ValueError) as error:
            warnings.warn(
                f"the index is committed, but the handle could not be brought to the version that has it ({error}); "
                "call checkout_latest()",
                stacklevel=4,
            )

    def vectors(self, column: str, fragment_ids: list[int] | None = None) -> _VectorSource:
        return _VectorSource(self.core, column, fragment_ids=fragment_ids)

    def field_id(self, path: str) -> int:
        found = self.core.field_id(path)
        if found is None:
            raise ColumnNotFoundError(f"{path} not found in schema")
        return found

    def path_of(self, field_id: int, path: str) -> str:
        """The path that a field has in this version; ``path`` is what it was called by."""
        found = self.core.path_of(field_id)
        if found is None:
            raise ArtifactMismatchError(
                f"column {path!r} did not exist in version {self.version} of {self.uri}, from which the artifact was encoded: a column that "
                "was called so then is another one"
            )
        return found

    def fragments_since(self, later: lance.LanceDataset) -> frozenset[int]:
        """Fragments of a later version that this one does not have."""
        return frozenset(f.fragment_id for f in later.get_fragments()) - set(self.fragment_ids())

    def fragment_ids(self) -> list[int]:
        return [f.fragment_id for f in self.dataset.get_fragments()]

    def count_rows(self, fragment_ids: list[int] | None) -> int:
        if fragment_ids is None:
            return int(self.dataset.count_rows())
        chosen = set(fragment_ids)
        return sum(f.count_rows() for f in self.dataset.get_fragments() if f.fragment_id in chosen)


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Lance's errors of reading a dataset as ours."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise StorageError(
            f"{what} cannot be read: the dataset was moved or removed, or the store failed. {lance_says(error)}"
        ) from error


def patient(work: Callable[[], T]) -> T:
    """Use a handle that another thread may be using: pylance refuses for as long as that one changes it."""
    deadline = time.monotonic() + BORROWED_SECONDS
    while True:
        try:
            return work()
        except RuntimeError as error:
            if "borrowed" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.005)


def branch_of(dataset: lance.LanceDataset) -> str | None:
    """The branch that a handle is on, which pylance does not say; None for main."""
    branch: str | None = Handle.of(dataset).core.branch
    return branch


def _as_lance(dataset: Any) -> lance.LanceDataset:
    if isinstance(dataset, (str, Path)):
        try:
            return lance.dataset(str(dataset))
        except (ValueError, OSError, UnicodeError) as error:
            uri = str(dataset)
            raise InvalidInputError(
                f"dataset: {shown_uri(uri)!r} cannot be opened: {without_secrets(str(error), uri)}"
            ) from error
    if not isinstance(dataset, lance.LanceDataset):
        raise InvalidTypeError(
            f"dataset: got {type(dataset).__name__}, expected a lance.LanceDataset, a LanceDB table, or a path"
        )
    if str(dataset.uri).startswith("memory:"):
        raise InvalidInputError(
            f"dataset {dataset.uri}: a dataset in memory can only be opened by the handle that made it; write it to a path"
        )
    if getattr(dataset, "_namespace_client_managed_versioning", False):
        raise InvalidInputError(MANAGED)
    return dataset


def _location(dataset: lance.LanceDataset) -> str:
    """Where a handle's dataset is, also where it was opened by a relative path and the directory has changed since.

    The handle keeps the path as it was given, and the absolute one where Python does not see it: but for what it says of a
    version that does not exist. Wherever this leads, the extension compares what it finds there with the handle.
    """
    uri = str(dataset.uri)
    if "://" in uri or Path(uri).is_absolute():
        return uri
    try:
        patient(lambda: cast(Any, dataset)._ds.checkout_version(2**62))
    except (OSError, ValueError) as error:
        found = re.search(r"Dataset at path (.+?)/_versions/", str(error))
        if found:
            return "/" + found[1].lstrip("/")
    return str(Path(uri).expanduser().resolve())


def vector_column(handle: Handle, column: str | list[str]) -> tuple[str, int]:
    """The column's path as the schema spells it, and its dimension. Errors are those of pylance."""
    if isinstance(column, (list, tuple)):
        if len(column) != 1:
            raise UnsupportedError(f"column: got {len(column)} columns, expected one")
        column = column[0]
    if not isinstance(column, str):
        raise refuse_type("column", column, "the name of a column")
    field: Any = handle.dataset.lance_schema.field_case_insensitive(column)
    if field is None:
        there = vector_columns(handle.dataset.schema)
        raise ColumnNotFoundError(
            f"{column} not found in schema; columns of vectors are {there[:10]}{nearest(column, there)}"
        )
    arrow = field.to_arrow()
    if isinstance(arrow.type, pa.FixedShapeTensorType) and len(arrow.type.shape) == 1:
        dimension, element = arrow.type.shape[0], arrow.type.value_type
    elif pa.types.is_fixed_size_list(arrow.type):
        dimension, element = arrow.type.list_size, arrow.type.value_type
    else:
        raise ColumnTypeError(
            f"Vector column {column} must be FixedSizeListArray 1-dimensional FixedShapeTensorArray, got {arrow.type}"
            + _how_to_cast(column, arrow.type)
        )
    if not pa.types.is_floating(element):
        raise ColumnTypeError(f"Vector column {column} must have floating value type, got {element}")
    return _spelling(handle, column), int(dimension)


def vector_columns(fields: Any, prefix: str = "") -> list[str]:
    """The paths of columns that can be indexed."""
    found = []
    for field in fields:
        kind = field.type
        if pa.types.is_struct(kind):
            found += vector_columns(kind, f"{prefix}{field.name}.")
        elif isinstance(kind, pa.FixedShapeTensorType):
            found += [prefix + field.name] if len(kind.shape) == 1 else []
        elif pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type):
            found.append(prefix + field.name)
    return found


def _how_to_cast(column: str, kind: pa.DataType) -> str:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return ""
    if not pa.types.is_floating(kind.value_type):
        return ""
    return (
        f"; lists of one length become vectors of DIM by ds.alter_columns({{'path': {column!r}, 'data_type': pa.list_(pa.float32(), DIM)}}), "
        "or by a cast to that type before they are written"
    )


def _spelling(handle: Handle, column: str) -> str:
    """pylance finds columns in any case; the schema's own spelling is what everything else needs."""
    fields: Any = handle.dataset.schema
    parts = []
    for part in column.split("."):
        names = {f.name.lower(): f for f in fields}
        exact = next((f for f in fields if f.name == part), None)
        field = exact or names.get(part.lower())
        if field is None:
            return column  # escaped or otherwise special: as given
        parts.append(field.name)
        fields = field.type if pa.types.is_struct(field.type) else []
    return ".".join(parts)
