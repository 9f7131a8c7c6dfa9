"""The user's pylance handle: what of it the extension needs, and the checks that pylance makes of a column."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa

from ._lance_artifact import _VectorSource
from .exceptions import ColumnNotFoundError, ColumnTypeError, InvalidInputError


@dataclass(frozen=True)
class Handle:
    """A dataset as the extension opens it again: by URI, version and storage options."""

    dataset: lance.LanceDataset
    uri: str
    version: int
    storage_options: dict[str, str] | None

    @classmethod
    def of(cls, dataset: Any) -> Handle:
        if isinstance(dataset, (str, Path)):
            dataset = lance.dataset(str(dataset))
        to_lance = getattr(dataset, "to_lance", None)
        if not isinstance(dataset, lance.LanceDataset) and callable(to_lance):
            dataset = to_lance()  # a LanceDB table
        if not isinstance(dataset, lance.LanceDataset):
            raise InvalidInputError(
                f"dataset: got {type(dataset).__name__}, expected a lance.LanceDataset, a LanceDB table, or a path"
            )
        uri = str(dataset.uri)
        if uri.startswith("memory:"):
            raise InvalidInputError(
                f"dataset {uri}: a dataset in memory can only be opened by the handle that made it; write it to a path"
            )
        if getattr(dataset, "_namespace_client_managed_versioning", False):
            raise InvalidInputError(
                "dataset: its namespace manages the versions, and it cannot be opened by URI; "
                "open it by URI with lance.dataset(uri) where that is allowed"
            )
        options = dataset.latest_storage_options()
        return cls(dataset, uri, int(dataset.version), dict(options) if options else None)

    def at(self, version: int) -> Handle:
        """The same dataset at another version, with the session and namespace of the user's handle."""
        if version == self.version:
            return self
        try:
            dataset = self.dataset.checkout_version(version)
        except (OSError, ValueError) as error:
            raise InvalidInputError(
                f"dataset {self.uri}: version {version}, from which the artifact was encoded, cannot be opened "
                f"({error}); it may have been cleaned up: tag versions that long builds read"
            ) from error
        return Handle(dataset, self.uri, version, self.storage_options)

    def vectors(self, column: str, fragment_ids: list[int] | None = None) -> _VectorSource:
        return _VectorSource(
            self.uri, self.version, column, fragment_ids=fragment_ids, storage_options=self.storage_options
        )

    def count_rows(self, fragment_ids: list[int] | None) -> int:
        if fragment_ids is None:
            return int(self.dataset.count_rows())
        chosen = set(fragment_ids)
        return sum(f.count_rows() for f in self.dataset.get_fragments() if f.fragment_id in chosen)


def vector_column(handle: Handle, column: str | list[str]) -> tuple[str, int]:
    """The column's path as the schema spells it, and its dimension. Errors are those of pylance."""
    if isinstance(column, (list, tuple)):
        if len(column) != 1:
            raise InvalidInputError(f"column: got {len(column)} columns, expected one")
        column = column[0]
    field: Any = handle.dataset.lance_schema.field_case_insensitive(column)
    if field is None:
        raise ColumnNotFoundError(f"{column} not found in schema")
    arrow = field.to_arrow()
    if isinstance(arrow.type, pa.FixedShapeTensorType) and len(arrow.type.shape) == 1:
        dimension, element = arrow.type.shape[0], arrow.type.value_type
    elif pa.types.is_fixed_size_list(arrow.type):
        dimension, element = arrow.type.list_size, arrow.type.value_type
    else:
        raise ColumnTypeError(
            f"Vector column {column} must be FixedSizeListArray 1-dimensional FixedShapeTensorArray, got {arrow.type}"
        )
    if not pa.types.is_floating(element):
        raise ColumnTypeError(f"Vector column {column} must have floating value type, got {element}")
    return _spelling(handle, column), int(dimension)


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
