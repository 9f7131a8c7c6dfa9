"""Vectors as every encoder of this package sees them, for encoders of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ._arguments import fragment_list, metric_name
from ._checked import checked
from ._dataset import Handle, vector_column

if TYPE_CHECKING:
    import lance


class PreparedVectors:
    """Batches of the vectors of a column that an index holds: see `prepared_vectors`. It can be iterated once."""

    def __init__(self, source: dict[str, Any], scan: Any, num_rows: int) -> None:
        self._source, self._scan, self._num_rows = source, scan, num_rows

    @property
    def source(self) -> dict[str, Any]:
        """Where the vectors come from, as ``PartitionArtifactBuilder(source=)`` takes it."""
        return self._source

    @property
    def dropped(self) -> dict[str, int]:
        """Rows dropped so far, by reason, as ``PartitionArtifactBuilder.finish(rows_dropped=)`` takes it."""
        dropped: dict[str, int] = self._scan.dropped
        return dropped

    @property
    def num_rows(self) -> int:
        """Live rows of the fragments: those that come, and those that are dropped."""
        return self._num_rows

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """Batches of ``_rowid: uint64`` and ``vector: fixed_size_list<T>[dimension]``, of about 16 MiB, in the order of the rows."""
        for batch in self._scan:
            if batch.num_rows:
                yield batch


@checked
def prepared_vectors(
    dataset: lance.LanceDataset | str | Path,
    column: str,
    *,
    metric: str,
    fragment_ids: Sequence[int] | None = None,
) -> PreparedVectors:
    """Scan the vectors of a column as an index of a metric holds them: what an encoder of your own should encode.

    Null vectors, vectors with a null, NaN or infinite element, and for cosine those of zero norm are dropped and counted, as
    Lance's own build leaves them out; for cosine the others are normalised.

    Parameters
    ----------
    dataset : lance.LanceDataset, LanceDB table, or path
        Rows are read at its version and branch.
    column : str
        ``fixed_size_list<float16|float32|float64>``; nested as ``"a.b"``.
    metric : {"l2", "euclidean", "cosine", "dot"}
        The model's.
    fragment_ids : sequence of int, optional
        These fragments only.

    Returns
    -------
    PreparedVectors
        Iterate it for record batches; then ``source`` and ``dropped`` go to the `PartitionArtifactBuilder`.

    Raises
    ------
    InvalidInputError, ColumnNotFoundError, ColumnTypeError
        A parameter does not fit.
    StorageError
        Reading failed.
    """
    handle = Handle.of(dataset)
    path, _ = vector_column(handle, column)
    metric = metric_name(metric)
    source = handle.vectors(path, fragment_list(fragment_ids))
    return PreparedVectors(source.describe(), source.scan(metric), source.count_rows())
