"""Credentials on their way to workers on a Ray cluster: each renews its own, and they go to no other store."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, vectors
from lance_artifact import _plan
from lance_artifact import ray as driver
from test_credentials import DIM, LIFETIME, ROWS, Asking, Gate, K, M, Vending, gate, s3  # noqa: F401
from test_ray import cluster  # noqa: F401

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

ray = pytest.importorskip("ray")

ASK: dict[str, Any] = {"num_partitions": K, "num_sub_vectors": M, "sample_rate": 7, "max_iters": 2}


class Late(driver.Worker):
    """A worker that begins when what was given for the job has ended, and is no quicker afterwards."""

    def encode(self, shard: int) -> int:
        time.sleep(2.2 * LIFETIME)
        return super().encode(shard)


def written(name: str, options: dict[str, str]) -> str:
    where = f"s3://vectors/{name}.lance"
    table = pa.table({"vector": column(vectors(ROWS, DIM))})
    lance.write_dataset(table, where, storage_options=options, max_rows_per_file=700)
    return where


@pytest.mark.parametrize("run", ["local", "remote"])
@pytest.mark.parametrize("by", ["path", "handle"])
def test_workers_renew_what_they_have(
    gate: Gate,  # noqa: F811
    s3: dict[str, str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    by: str,
    run: str,
) -> None:
    monkeypatch.setattr(driver, "Worker", Late)
    where, asking = written(f"ray-{by}-{run}", s3), Asking(gate.endpoint)
    given = (
        {"uri": where, "storage_options": asking}
        if by == "path"
        else {"uri": lance.dataset(namespace_client=Vending(asking, where), table_id=["t"])}
    )
    place = f"{where}-run" if run == "remote" else str(tmp_path / "run")
    built = driver.create_index(
        column="vector", artifact_uri=place, num_workers=2, num_shards=3, **given, **ASK
    )
    assert built.stats.index_stats("vector_idx")["num_indexed_rows"] == ROWS


def test_a_callable_that_cannot_be_sent_is_refused(
    gate: Gate,  # noqa: F811
    s3: dict[str, str],  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where, lock = written("ray-unsent", s3), threading.Lock()
    seen: list[Any] = []

    def asked() -> dict[str, str]:
        with lock:
            return gate.issue()

    for options, named in (
        ({"storage_options": asked}, "storage_options: "),
        ({"storage_options": s3, "artifact_storage_options": asked}, "artifact_storage_options: "),
    ):
        with pytest.raises(
            la.InvalidInputError, match=f"^{named}this callable cannot be sent to the workers"
        ):
            driver.create_index(where, "vector", artifact_uri=tmp_path / "run", **options, **ASK)
    assert not (tmp_path / "run").exists()
    # A handle's own are as they were.
    monkeypatch.setattr(driver.Run, "create", lambda *_, **options: seen.append(options) or 1 / 0)
    ds = lance.dataset(namespace_client=Vending(gate, where), table_id=["t"])
    with caplog.at_level(logging.WARNING, "lance_artifact"), pytest.raises(ZeroDivisionError):
        driver.create_index(ds, "vector", artifact_uri=tmp_path / "run", num_workers=1, **ASK)
    assert "workers get the storage options of the dataset as they are now" in caplog.text
    assert "aws_secret_access_key" in seen[0]["dataset_storage_options"] and '"key' not in caplog.text


def test_options_of_the_dataset_go_to_no_run_elsewhere(
    s3: dict[str, str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the dataset go to a run in the same bucket, and to none elsewhere."""
    where = written("ray-own", s3)
    seen: list[Any] = []

    def create(planned: Any, place: str, **options: Any) -> Any:
        for of in ("storage_options", "dataset_storage_options"):
            # pylance's own.
            seen.append({k: v for k, v in (options[of] or {}).items() if k != "user_agent"})
        raise InterruptedError

    monkeypatch.setattr(driver.Run, "create", create)
    for module in (driver, _plan):
        monkeypatch.setattr(module, "is_run", lambda *_: False)
    for place, given, expected in (
        ("s3://vectors/run", {}, s3),
        ("s3://others/run", {}, {}),
        ("gs://vectors/run", {}, {}),
        (str(tmp_path / "run"), {}, {}),
        ("s3://others/run", {"artifact_storage_options": {"a": "b"}}, {"a": "b"}),
        ("s3://vectors/run", {"artifact_storage_options": {}}, {}),
    ):
        for uri, options in (
            (where, {"storage_options": s3}),
            (lance.dataset(where, storage_options=s3), {}),
        ):
            with pytest.raises(InterruptedError):
                driver.create_index(uri, "vector", artifact_uri=place, **options, **given, **ASK)
            assert [seen.pop(), seen.pop()] == [s3, expected], place


class Breaking:
    """A callable whose connection breaks the first time that a worker asks."""

    def __init__(self, note: Path) -> None:
        self.note, self.driver = note, os.getpid()

    def __call__(self) -> dict[str, str]:
        if os.getpid() != self.driver and self.note.exists():
            self.note.unlink()
            raise ConnectionResetError("reset by peer")
        return {}


def test_a_callable_whose_connection_breaks_once_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "PAUSE", 0.05)
    where, note = str(tmp_path / "t.lance"), tmp_path / "note"
    lance.write_dataset(pa.table({"vector": column(vectors(ROWS, DIM))}), where, max_rows_per_file=700)
    note.touch()
    built = driver.create_index(
        where,
        "vector",
        artifact_uri=tmp_path / "run",
        num_workers=1,
        num_shards=2,
        storage_options=Breaking(note),
        **ASK,
    )
    assert built.stats.index_stats("vector_idx")["num_indexed_rows"] == ROWS and not note.exists()
