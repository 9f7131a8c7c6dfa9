"""The name of an index that nobody named: pylance's own, also where an index of another column has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import accelerate, column, command_line, vectors
from lance_artifact import _create_index, cli
from lance_artifact.backends.cpu import CpuBackend

ROWS, DIM = 600, 16
SHAPE: dict[str, Any] = {"num_partitions": 2, "num_sub_vectors": 4, "sample_rate": 8}
TAKEN = (
    {},
    {"vector_idx": "id"},
    {"vector_idx": "id", "vector_idx_2": "other"},
    {"vector_idx": "id", "vector_idx_3": "id"},
    {"VECTOR_IDX": "id"},
    {"vector_idx_2": "id"},
)


def table(place: Path, taken: dict[str, str]) -> Any:
    array = column(vectors(ROWS, DIM))
    content = pa.table({"id": pa.array(range(ROWS)), "vector": array, "other": pa.array(range(ROWS))})
    ds = lance.write_dataset(content, str(place))
    for name, of in taken.items():
        ds.create_scalar_index(of, "BTREE", name=name)
    return ds


def names(ds: Any) -> dict[str, list[str]]:
    return {index.name: list(index.field_names) for index in ds.describe_indices()}


def ended(call: Any) -> str | None:
    try:
        call()
    except Exception as error:
        return "already exists" if "already exists" in str(error) else str(error)
    return None


@pytest.mark.parametrize("taken", TAKEN, ids=",".join)
def test_it_is_pylances(taken: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate(monkeypatch, CpuBackend())
    stock, ours = table(tmp_path / "stock.lance", taken), table(tmp_path / "ours.lance", taken)
    parts = [
        ds.create_index_uncommitted("vector", "IVF_PQ", fragment_ids=[0], **SHAPE, **on).name
        for ds, on in ((stock, {}), (ours, {"accelerator": "cuvs"}))
    ]
    assert parts[0] == parts[1]
    for more in ({}, {}, {"replace": True}, {"replace": True, "train": False}):
        ends = [
            ended(lambda ds=ds, on=on, more=more: ds.create_index("vector", "IVF_PQ", **SHAPE, **more, **on))
            for ds, on in ((stock, {}), (ours, {"accelerator": "cuvs"}))
        ]
        assert ends[0] == ends[1]
        assert names(ours) == names(stock)


def test_every_door_gives_the_same_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = {"vector_idx": "id"}

    def fresh(place: str) -> Any:
        return table(tmp_path / place, taken)

    expected = {"vector_idx": ["id"], "vector_idx_2": ["vector"]}
    ds = fresh("run.lance")
    run: dict[str, Any] = {"artifact_uri": tmp_path / "run", "resume": True, "backend": "cpu", "verify": True}
    version = la.create_index(ds, "vector", **run, **SHAPE).version
    assert names(ds) == expected
    # The same call again finds the run's own index under that name.
    assert la.create_index(ds, "vector", **run, **SHAPE).version == version and names(ds) == expected
    ds = fresh("finalize.lance")
    assert la.plan(ds, "vector", backend="cpu", calibrate=False, **SHAPE).name == "vector_idx_2"
    model = la.train(ds, "vector", backend="cpu", **SHAPE)
    artifact = la.build_artifact(ds, "vector", model, tmp_path / "a", backend="cpu")
    assert la.build_segment(ds, "vector", artifact).name == "vector_idx_2"
    assert names(la.finalize(ds, "vector", artifact)) == expected
    ds = fresh("command.lance")
    options = command_line(backend="cpu", **SHAPE)
    assert cli.main(["build", ds.uri, "VECTOR", *options, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["index"], told["index_type"], told["num_partitions"]) == ("vector_idx_2", "IVF_PQ", 2)


def test_a_name_that_was_given_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = table(tmp_path / "d.lance", {"vector_idx": "id"})
    monkeypatch.setattr(_create_index, "train_handle", lambda *_: pytest.fail("trained"))
    for replace in (False, True):
        with pytest.raises(la.InvalidInputError, match=r"is on \['id'\], not on 'vector'"):
            la.create_index(ds, "vector", name="vector_idx", replace=replace, backend="cpu", **SHAPE)
