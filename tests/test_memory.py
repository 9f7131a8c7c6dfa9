"""`memory_limit` of whole calls: what does not fit is refused with what would, and what fits gives the same index."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, encoded, stored, vectors


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


@pytest.fixture
def model() -> la.IvfPqModel:
    rng = np.random.default_rng(0)
    return la.IvfPqModel(
        rng.standard_normal((4, 8)).astype("f4"), rng.standard_normal((8, 256, 1)).astype("f4")
    )


def shards(ds: Any, model: la.IvfPqModel, folder: Path) -> list[la.Artifact]:
    made = []
    for fragment in ds.get_fragments():
        number, rows = fragment.fragment_id, fragment.count_rows()
        source = la.describe_source(ds, "vector", fragment_ids=[number])
        with la.PartitionArtifactBuilder(folder / str(number), model, source=source) as builder:
            builder.append_batch(encoded(rows, 4, 8, seed=number, first=number << 32))
        made.append(builder.artifact)
    return made


def test_what_does_not_fit_is_refused_with_what_would(
    write: Callable[..., Any], model: la.IvfPqModel, tmp_path: Path
) -> None:
    ds = write(vectors(3000, 8))
    made = shards(ds, model, tmp_path / "shards")
    with pytest.raises(
        la.InvalidInputError, match="memory_limit: got 1048576 bytes, expected at least"
    ) as error:
        la.finalize(ds, "vector", made, memory_limit=1 << 20)
    assert not ds.describe_indices() and not (tmp_path / "vectors.lance" / "_indices").exists()
    la.finalize(ds, "vector", made, memory_limit=numbers(str(error.value))[1])
    assert sum(map(len, stored(ds, "vector_idx"))) == 3000


def test_a_partition_of_several_artifacts_slice_by_slice(model: la.IvfPqModel, tmp_path: Path) -> None:
    """Three artifacts, whose partitions are cut at other places than the artifacts are."""
    values = np.zeros((900_000, 8), np.float32)
    table = pa.table({"vector": column(values)})
    ds = lance.write_dataset(table, str(tmp_path / "t.lance"), max_rows_per_file=300_007)
    made = shards(ds, model, tmp_path / "shards")
    la.finalize(ds, "vector", made, name="whole")
    la.finalize(ds, "vector", made, name="sliced", memory_limit=14 << 20)
    assert stored(ds, "whole") == stored(ds, "sliced")
