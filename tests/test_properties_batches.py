"""`PartitionArtifactBuilder` with whatever Arrow can say, against a plain model of it: a list of rows for each partition.

What is accepted is read back exactly, in order; what is refused changes nothing. See `test_properties.py`.
"""

from __future__ import annotations

import itertools
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, note
from hypothesis import strategies as st

import lance_artifact as la
from conftest import leftovers, vectors
from odd_values import anything, examples

SHORT = {"_rowid": "row_id", "__ivf_part_id": "part_id", "__pq_code": "pq_code"}
LONG = {short: name for name, short in SHORT.items()}
Row = tuple[int, bytes]


class _Wrapped(pa.ExtensionType):
    """A type of somebody's own over one of Arrow's."""

    def __init__(self, storage: pa.DataType) -> None:
        super().__init__(storage, "lance_artifact.test")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, _: bytes) -> _Wrapped:
        return cls(storage)


# -- the model


def rows_of(batch: pa.RecordBatch, partitions: int, width: int) -> list[tuple[int, Row]] | None:
    """The rows of a batch with their partitions, or None where the documentation says that it is refused."""
    columns: dict[str, pa.Array] = {}
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        full = LONG.get(name, name)
        if full not in SHORT or full in columns:
            return None
        columns[full] = array.storage if isinstance(array, pa.ExtensionArray) else array
    if columns.keys() != SHORT.keys():
        return None
    ids, parts, codes = (columns[name] for name in SHORT)
    kind = codes.type
    if ids.type != pa.uint64() or parts.type != pa.uint32() or not pa.types.is_fixed_size_list(kind):
        return None
    if kind.value_type != pa.uint8() or kind.list_size != width:
        return None
    values = list(zip(ids.to_pylist(), parts.to_pylist(), codes.to_pylist(), strict=True))
    for row_id, part, code in values:
        if row_id is None or part is None or code is None or None in code or part >= partitions:
            return None
    return [(part, (row_id, bytes(code))) for row_id, part, code in values]


def batches_of(data: Any) -> list[pa.RecordBatch]:
    """The batches that an Arrow object stands for, as pyarrow hands them over."""
    if isinstance(data, pa.StructArray):
        return [pa.record_batch(data.flatten(), names=[f.name for f in data.type])]
    if isinstance(data, pa.RecordBatch):
        return [data]
    return list(data.to_reader())


@dataclass
class Model:
    """What an artifact must hold."""

    partitions: int
    width: int
    rows: list[list[Row]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = [[] for _ in range(self.partitions)]

    def append(self, data: Any) -> bool:
        """Take batches up to the first that is refused; whether none was."""
        for batch in batches_of(data):
            rows = rows_of(batch, self.partitions, self.width)
            if rows is None:
                return False
            for part, row in rows:
                self.rows[part].append(row)
        return True

    @property
    def count(self) -> int:
        return sum(map(len, self.rows))


def stored(artifact: la.Artifact) -> list[list[Row]]:
    found = []
    for partition in range(artifact.num_partitions):
        table = artifact.read_partition(partition).read_all()
        codes = [bytes(c) for c in table["__pq_code"].to_pylist()] if table.num_rows else []
        found.append(list(zip(table["_rowid"].to_pylist(), codes, strict=True)))
    return found


# -- batches of all kinds


def padded(array: pa.Array, before: int, after: int) -> pa.Array:
    """The same values as a slice of a longer array, whose other values are null."""
    parts = [pa.nulls(before, array.type), array, pa.nulls(after, array.type)]
    return pa.concat_arrays(parts).slice(before, len(array))


WRONG_TYPES = {
    "_rowid": [pa.int64(), pa.uint32(), pa.float64(), pa.string(), pa.decimal128(20, 0), pa.dictionary(pa.int8(), pa.uint64()), pa.null()],
    "__ivf_part_id": [pa.uint64(), pa.int32(), pa.uint8(), pa.float32(), pa.dictionary(pa.int32(), pa.uint32()), pa.binary()],
}  # fmt: skip


@st.composite
def batches(draw: st.DrawFn, partitions: int, width: int) -> Any:
    """A struct of columns in any form; now and then with something wrong."""
    count = draw(st.one_of(st.just(0), st.integers(1, 30)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = rng.integers(0, 2**64, count, dtype=np.uint64, endpoint=False)
    if count and draw(st.booleans()):
        ids[rng.integers(count)] = draw(st.sampled_from([0, 2**63, 2**64 - 1]))
    wrong = draw(st.sampled_from(["", "", "", "", "type", "width", "items", "null", "null item", "partition", "missing", "twice", "both", "extra"]))  # fmt: skip
    note(f"{count} rows, wrong: {wrong or 'nothing'}")
    parts = rng.integers(0, partitions, count, dtype=np.uint32)
    if wrong == "partition" and count:
        parts[rng.integers(count)] = draw(st.sampled_from([partitions, 2**32 - 1]))
    size = width + draw(st.sampled_from([1, 3])) if wrong == "width" else width
    values = pa.array(rng.integers(0, 128, count * size, dtype=np.uint8))
    if wrong == "items":
        values = values.cast(draw(st.sampled_from([pa.int8(), pa.uint16()])))
    if wrong == "null item" and count:
        values = pa.array([None, *values.to_pylist()[1:]], values.type)
    item = pa.field(
        draw(st.sampled_from(["item", "element", ""])),
        values.type,
        draw(st.booleans()) or wrong == "null item",
    )
    columns: dict[str, pa.Array] = {
        "_rowid": pa.array(ids), "__ivf_part_id": pa.array(parts), "__pq_code": pa.FixedSizeListArray.from_arrays(values, type=pa.list_(item, size)),
    }  # fmt: skip
    if wrong == "type":
        name = draw(st.sampled_from(sorted(WRONG_TYPES)))
        small = pa.array(rng.integers(0, min(partitions, 100), count))
        kind = draw(st.sampled_from(WRONG_TYPES[name]))
        dictionary = pa.types.is_dictionary(kind)
        columns[name] = pa.nulls(count) if pa.types.is_null(kind) else small.cast(pa.string()).cast(kind) if pa.types.is_binary(kind) else (small.cast(kind.value_type).dictionary_encode() if dictionary else small.cast(kind))  # fmt: skip
    if wrong == "null" and count:
        name = draw(st.sampled_from(sorted(SHORT)))
        columns[name] = pa.array([None, *columns[name].to_pylist()[1:]], columns[name].type)
    if draw(st.booleans()):
        for name in columns:
            columns[name] = padded(columns[name], *draw(st.sampled_from([(1, 0), (8, 3), (0, 1), (13, 64)])))
    names = {name: draw(st.sampled_from([name, name, SHORT[name]])) for name in SHORT}
    order = draw(st.permutations(sorted(SHORT)))
    if wrong == "missing":
        order = order[:2]
    made = [(names[name], columns[name]) for name in order]
    if wrong in ("twice", "both"):
        name = draw(st.sampled_from(sorted(SHORT)))
        again = names[name] if wrong == "twice" else {**SHORT, **LONG}[names[name]]
        made.append((again, columns[name]))
    if wrong == "extra":
        made.insert(
            draw(st.integers(0, 3)),
            (draw(st.sampled_from(["score", "", "_ROWID", "ünï\n"])), pa.nulls(count, pa.int8())),
        )
    if draw(st.integers(0, 4)) == 0:
        made = [(name, _wrapped(draw, array)) for name, array in made]
    return draw(containers(made, count))


def _wrapped(draw: st.DrawFn, array: pa.Array) -> pa.Array:
    if pa.types.is_null(array.type) or pa.types.is_dictionary(array.type):
        return array
    if (
        pa.types.is_fixed_size_list(array.type)
        and array.type.value_field.name == "item"
        and draw(st.booleans())
    ):
        kind = pa.fixed_shape_tensor(array.type.value_type, [array.type.list_size])
        if kind.storage_type == array.type:
            return pa.ExtensionArray.from_storage(kind, array)
    return pa.ExtensionArray.from_storage(_Wrapped(array.type), array)


def containers(columns: list[tuple[str, pa.Array]], count: int) -> st.SearchStrategy[Any]:
    """The same columns as each thing that may hold them."""
    names, arrays = [n for n, _ in columns], [a for _, a in columns]
    schema = pa.schema(
        [pa.field(n, a.type, metadata={"k": "v"}) for n, a in columns], metadata={"about": "x"}
    )
    batch = pa.record_batch(arrays, schema=schema)

    def cut(places: list[list[int]]) -> pa.Table:
        """Columns whose chunks end at different rows."""
        chunked = []
        for array, ends in zip(arrays, places, strict=True):
            edges = [0, *sorted(end % (count + 1) for end in ends), count]
            chunked.append(pa.chunked_array([array.slice(a, b - a) for a, b in itertools.pairwise(edges)], array.type))  # fmt: skip
        return pa.table(chunked, names)

    edges = st.lists(st.integers(0, 100), max_size=3)
    return st.one_of(
        st.just(batch),
        st.just(pa.Table.from_batches([batch])),
        st.lists(edges, min_size=len(arrays), max_size=len(arrays)).map(cut),
        st.just(pa.StructArray.from_arrays(arrays, fields=list(schema))),
        st.just(
            pa.concat_arrays([pa.StructArray.from_arrays(arrays, fields=list(schema))] * 3).slice(
                count, count
            )
        ),
    )


# -- what a builder makes of them


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("batches")
    yield made
    shutil.rmtree(made, ignore_errors=True)


def feed(builder: la.PartitionArtifactBuilder, model: Model, data: Any) -> None:
    """Append to a builder and to its model: both take it, or both refuse it."""
    before = model.count
    taken = model.append(data)
    try:
        assert builder.append_batch(data) == model.count - before
    except la.InvalidInputError as error:
        assert not taken, f"refused: {error}"
        assert str(error).startswith("append_batch: "), str(error)
    else:
        assert taken, "a batch was taken that must be refused"
    assert builder.num_rows == model.count


@examples(150)
@given(data=st.data(), partitions=st.integers(1, 9), width=st.integers(1, 7))
def test_what_is_accepted_is_read_back(data: st.DataObject, partitions: int, width: int, root: Path) -> None:
    place = root / uuid.uuid4().hex
    options = {
        "num_buckets": data.draw(st.none() | st.integers(1, partitions)),
        "memory_limit": data.draw(st.none() | st.just(16 << 20)),
        "expected_rows": data.draw(st.sampled_from([None, 0, 5, 1000])),
        "format_version": data.draw(st.sampled_from([None, 1, 2])),
        "sync": False,
    }
    shape = {"num_partitions": partitions, "pq_code_width": width}
    there: Model | None = None
    for overwrite in (False, *data.draw(st.lists(st.booleans(), max_size=2))):
        if there is not None and not overwrite:
            before = {p: (place / p).read_bytes() for p in leftovers(place)}
            with pytest.raises(la.ArtifactExistsError, match="overwrite"):
                la.PartitionArtifactBuilder(place, **shape, **options)
            assert {p: (place / p).read_bytes() for p in leftovers(place)} == before
            continue
        model = Model(partitions, width)
        builder = la.PartitionArtifactBuilder(place, **shape, **options, overwrite=overwrite)
        for _ in range(data.draw(st.integers(0, 4))):
            feed(builder, model, data.draw(batches(partitions, width)))
        if data.draw(st.integers(0, 5)) == 0:
            builder.abort()
            if there is None:
                assert leftovers(place) == [] and not place.exists()
                return
            model = there
            artifact = la.Artifact.open(place)
        else:
            dropped = data.draw(
                st.none()
                | st.dictionaries(
                    st.text(max_size=3).filter(lambda t: t.isprintable()), st.integers(0, 9), max_size=2
                )
            )
            artifact = finished(builder, model, dropped)
        there = model
        assert stored(artifact) == model.rows
        assert artifact.partition_sizes() == [len(rows) for rows in model.rows]
        assert artifact.num_rows == model.count
        everything = [row_id for rows in model.rows for row_id, _ in rows]
        report = artifact.verify()
        assert report.duplicate_row_ids == len(everything) - len(set(everything))
        assert report.ok == (report.duplicate_row_ids == 0), report.problems
        assert len(leftovers(place)) == 1 + len(artifact.manifest["files"]), leftovers(place)


def finished(
    builder: la.PartitionArtifactBuilder, model: Model, dropped: dict[str, int] | None
) -> la.Artifact:
    """Finish: counts that do not add up are refused first, and nothing is published."""
    total = model.count + sum((dropped or {}).values())
    with pytest.raises(la.InvalidInputError, match="rows seen"):
        builder.finish(rows_seen=total + 1, rows_dropped=dropped)
    with pytest.raises(la.InvalidInputError, match="not finished"):
        _ = builder.artifact
    artifact = builder.finish(rows_seen=total, rows_dropped=dropped)
    assert artifact.manifest["rows"] == {"seen": total, "written": model.count, "dropped": dropped or {}}
    return artifact


@examples(100)
@given(wrong=anything)
def test_what_is_no_batch_is_refused(wrong: Any, root: Path) -> None:
    place = root / uuid.uuid4().hex
    builder = la.PartitionArtifactBuilder(place, num_partitions=2, pq_code_width=1, sync=False)
    model = Model(2, 1)
    feed(builder, model, good(3))
    try:
        # Of a table without rows there is nothing to refuse.
        assert builder.append_batch(wrong) == 0 and isinstance(wrong, pa.Table)
    except la.InvalidInputError as error:
        assert str(error).startswith("append_batch: ")
    assert stored(builder.finish()) == model.rows


def good(count: int) -> pa.RecordBatch:
    codes = pa.FixedSizeListArray.from_arrays(pa.array(range(count), pa.uint8()), 1)
    return pa.record_batch({"row_id": pa.array(range(count), pa.uint64()), "part_id": pa.array([1] * count, pa.uint32()), "pq_code": codes})  # fmt: skip


class _Fails:
    """An Arrow object that raises, or hands over something else, when it is asked for its data."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __arrow_c_array__(self, *_: Any) -> Any:
        return self.answer()


def raises() -> Any:
    raise KeyError("gone")


def failing() -> Iterator[pa.RecordBatch]:
    yield good(2)
    raise RuntimeError("the source broke")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pa.array([1, 2]), "Int64"),
        (pa.chunked_array([[1, 2]]), "Int64"),
        (pa.array([{"row_id": 1}, None]), "null"),
        (pa.chunked_array([pa.array([{"row_id": 1}, None])]), "null"),
        (pa.StructArray.from_arrays(good(3).columns, names=good(3).schema.names, mask=pa.array([False, True, False])), "null"),
        (pa.chunked_array([pa.StructArray.from_arrays(good(3).columns, names=good(3).schema.names, mask=pa.array([False, True, False]))]), "null"),
        (pa.record_batch({}), "missing"),
        (pa.StructArray.from_arrays([], fields=[]), "missing"),
        (_Fails(lambda: 3), "append_batch"),
        (_Fails(lambda: (1, 2)), "append_batch"),
    ],
    ids=["array", "chunked", "struct", "chunked struct", "masked", "chunked masked", "no columns", "no fields", "no tuple", "no capsules"],
)  # fmt: skip
def test_arrow_objects_that_are_no_batches(data: Any, message: str, tmp_path: Path) -> None:
    builder = la.PartitionArtifactBuilder(tmp_path / "a", num_partitions=2, pq_code_width=1)
    builder.append_batch(good(3))
    with pytest.raises(la.InvalidInputError, match=message) as caught:
        builder.append_batch(data)
    assert str(caught.value).startswith("append_batch: ") and builder.num_rows == 3
    assert builder.finish().num_rows == 3


def test_what_a_source_raises_is_not_swallowed(tmp_path: Path) -> None:
    builder = la.PartitionArtifactBuilder(tmp_path / "a", num_partitions=2, pq_code_width=1)
    with pytest.raises(KeyError, match="gone"):
        builder.append_batch(_Fails(raises))
    # Of a stream, batches before the one that fails have been taken.
    with pytest.raises(la.InvalidInputError, match="the source broke"):
        builder.append_batch(pa.RecordBatchReader.from_batches(good(2).schema, failing()))
    assert builder.num_rows == 2
    closed = pa.RecordBatchReader.from_batches(good(2).schema, iter([good(2)]))
    assert builder.append_batch(closed) == 2 and builder.append_batch(closed) in (0, 2)


@examples(40)
@given(batch=batches(3, 2))
def test_a_model_and_its_shape_take_the_same(batch: Any, root: Path) -> None:
    """A builder of a model refuses and takes what one of its shape does."""
    model = la.IvfPqModel(vectors(3, 4), vectors(2 * 256, 2, seed=1).reshape(2, 256, 2))
    by_model = la.PartitionArtifactBuilder(root / uuid.uuid4().hex, model, sync=False)
    plain = Model(3, 2)
    feed(by_model, plain, batch)
    artifact = by_model.finish()
    assert stored(artifact) == plain.rows and artifact.model == model
