"""Values for arguments: right ones in every documented type, and everything else that people pass. For property tests."""

from __future__ import annotations

import datetime
import decimal
import fractions
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# How many times as many examples as in the test command, and then other ones each time.
TIMES = int(os.environ.get("LANCE_ARTIFACT_PROPERTIES", "1"))


def examples(count: int) -> Any:
    """Settings of a property: so many examples, the same ones each time, in the test command."""
    return settings(
        max_examples=count * TIMES, derandomize=TIMES == 1, deadline=datetime.timedelta(seconds=60), print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )  # fmt: skip


class PathOf:
    """A path of whatever is given."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __fspath__(self) -> Any:
        return self.value

    def __repr__(self) -> str:
        return f"PathOf({self.value!r})"


class Fails:
    """Everything that is asked of it fails."""

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("asked of a value that fails")

    __repr__ = __str__ = __iter__ = __len__ = __bool__ = __index__ = __float__ = __array__ = __fspath__ = (
        __hash__
    ) = __eq__ = _fail  # type: ignore[assignment]


def once(values: list[Any]) -> Iterator[Any]:
    """A generator."""
    yield from values


TEXTS = ["", " ", "a\0b", "\0", "x\ny", "ünïcödé 🜁", "\ud800", "a\udcffb", "..", "a/b", "%s{}", "x" * 300, "None", "nowhere://x", "3", "vector"]  # fmt: skip
NUMBERS: list[Any] = [
    -1, 0, 2**31, 2**32, 2**63, 2**64, 10**30, -(10**400), 1.5, -0.0, float("nan"), float("inf"), 1e300, 4j, np.int8(-1), np.uint64(2**64 - 1),
    np.float32(2.5), np.float64("nan"), np.bool_(True), np.str_("x"), np.datetime64("2020-01-01"), decimal.Decimal("NaN"), fractions.Fraction(1, 3),
]  # fmt: skip
OBJECTS: list[Any] = [
    b"", b"vector", bytearray(b"x"), memoryview(b"x"), (), frozenset(), range(0), np.array([]), np.array(3), np.array([[1, 2]]), np.array([None]),
    pa.array([], pa.int64()), pa.array(["a"]), pa.scalar(1), pa.table({}), pa.schema([]), int, len, ..., NotImplemented, datetime.timedelta(1),
    Path("x"), PathOf("x"), PathOf(b"x"), PathOf(3), SimpleNamespace(uri="x", name="cpu", is_set=3),
]  # fmt: skip

_leaf = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=3)
)
anything: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(TEXTS),
    st.sampled_from(NUMBERS),
    st.sampled_from(OBJECTS),
    st.text(max_size=8),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.recursive(_leaf, lambda inner: st.lists(inner, max_size=3), max_leaves=6),
    st.dictionaries(st.one_of(st.text(max_size=3), st.integers(), st.none()), _leaf, max_size=3),
    st.lists(_leaf, max_size=3).map(once),
    st.builds(object),
    st.builds(Fails),
)
"""Anything at all."""


def forms_of_numbers(values: list[int]) -> st.SearchStrategy[Any]:
    """The same whole numbers in each type that is an iterable of them."""
    return st.sampled_from(
        [list, tuple, np.array, once, lambda v: pa.array(v, pa.int64()), lambda v: pa.chunked_array([v[:1], v[1:]], pa.int64()), lambda v: dict.fromkeys(v).keys()]
    ).map(lambda form: form(values))  # fmt: skip


def forms_of_matrix(array: np.ndarray) -> st.SearchStrategy[Any]:
    """The same floats in each type that is taken for an array of rows."""
    flat = np.ascontiguousarray(array).reshape(-1, array.shape[-1])
    lists = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), array.shape[-1])
    padded = pa.concat_arrays([lists, lists, lists])
    made: list[Any] = [
        array,
        np.asfortranarray(array),
        np.repeat(array, 2, axis=0)[::2],
        lists,
        padded.slice(len(lists), len(lists)),
        pa.chunked_array([lists.slice(0, 1), lists.slice(1)]),
        pa.FixedSizeListArray.from_arrays(lists.flatten(), type=pa.list_(pa.field("x", lists.type.value_type, False), array.shape[-1])),
    ]  # fmt: skip
    if array.ndim == 2:
        made += [array.tolist()] if array.dtype == np.float64 else [list(array)]
        made += [pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(array))]
    return st.sampled_from(made)
