"""What workers on a Ray cluster hold, and how they share a machine's memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lance_artifact as la
from conftest import LINUX, vectors
from lance_artifact import _ray_nodes
from lance_artifact import ray as driver
from test_extend import DIM, ROWS, K, M, append
from test_memory import MARGIN, wide  # noqa: F401
from test_ray import Dying, build, cluster, dying  # noqa: F401

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

ray = pytest.importorskip("ray")


class Measured(driver.Worker):
    """A worker that writes down what it took at the most while it trained, and while it drew."""

    def _took(self, what: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(what)) << 10

    def _measured(self, stage: str, work: Any) -> Any:
        # The dataset is open, code is paged in.
        self.fitting()
        Path("/proc/self/clear_refs").write_text("5")
        before = self._took("VmRSS")
        try:
            return work()
        finally:
            (Path(os.environ["NOTES"]) / f"{stage}-{os.getpid()}").write_text(
                str(self._took("VmHWM") - before)
            )

    def train(self, *arguments: Any) -> str:
        found: str = self._measured("train", lambda: super(Measured, self).train(*arguments))
        return found

    def sample(self, *arguments: Any) -> Any:
        return self._measured("sample", lambda: super(Measured, self).sample(*arguments))


@LINUX
def test_training_on_a_sample_of_all_workers_keeps_within_the_limit_of_one(
    wide: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in what is mapped of Ray's store."""
    monkeypatch.setattr(driver, "Worker", Measured)
    limit = 128 << 20
    driver.create_index(
        wide / "t.lance",
        "vector",
        artifact_uri=tmp_path / "run",
        num_partitions=512,
        num_sub_vectors=16,
        max_iters=2,
        num_workers=2,
        num_shards=4,
        memory_limit=limit,
        replace=True,
        ray_remote_args={"runtime_env": {"env_vars": {"NOTES": str(tmp_path)}}},
    )
    taken = {path.name.split("-")[0]: int(path.read_text()) >> 20 for path in tmp_path.glob("*-*")}
    assert taken.keys() == {"train", "sample"}
    assert max(taken.values()) < (limit >> 20) + MARGIN, taken


class Leaving(Dying):
    """A worker that ends when it is asked for what it has drawn."""

    def part(self, start: int, rows: int) -> Any:
        self._die("part")
        return super().part(start, rows)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_worker_that_dies_with_its_part_of_the_sample(
    write: Callable[..., Any],
    tmp_path: Path,
    dying: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    """All is drawn again, and of the same seed comes the same model."""
    monkeypatch.setattr(driver, "Worker", Leaving)
    array = vectors(60_000, 256 if dtype == "float16" else 64, dtype)
    models = []
    for times in (0, 1):
        ds = write(array, f"{times}.lance", max_rows_per_file=15_000)
        dying("part", times)
        build(
            ds,
            tmp_path / f"run{times}",
            num_partitions=220,
            num_shards=4,
            memory_limit=16 << 20,
            ray_remote_args={"runtime_env": {"env_vars": {"DYING": str(tmp_path / "notes")}}},
        )
        models.append(la.IvfPqModel.from_index(ds, "vector_idx"))
        assert not list((tmp_path / "notes").iterdir())
    assert models[0] == models[1] and models[0].dtype == dtype


def test_a_limit_that_no_shard_fits_is_refused_before_there_is_a_run(
    write: Callable[..., Any], tmp_path: Path
) -> None:
    ds = write(vectors(ROWS, DIM))
    with pytest.raises(la.InvalidInputError, match="memory_limit: got 1048576 bytes, expected at least"):
        build(ds, tmp_path / "run", memory_limit=1 << 20)
    la.create_index(ds, "vector", num_partitions=K, num_sub_vectors=M, max_iters=2, backend="cpu")
    append(ds, vectors(100, DIM, seed=1))
    with pytest.raises(la.InvalidInputError, match="memory_limit: got 1048576 bytes, expected at least"):
        driver.extend_index(ds, "vector_idx", artifact_uri=tmp_path / "run", memory_limit=1 << 20)
    options: dict[str, Any] = {"artifact_uri": tmp_path / "run", "resume": True, "replace": True}
    with pytest.raises(la.InvalidInputError, match="memory_limit: got 1048576 bytes, expected at least"):
        la.create_index(ds, "vector", num_partitions=K, num_sub_vectors=M, memory_limit=1 << 20, **options)
    assert not (tmp_path / "run").exists()


class Counted(driver.Worker):
    """A worker that writes down with how many it shares its machine."""

    def __init__(self, run: Any, backend: str, workers_of_node: int, memory_limit: int | None) -> None:
        super().__init__(run, backend, workers_of_node, memory_limit)
        notes = Path(os.environ["NOTES"])
        (notes / f"shares-{os.getpid()}").write_text(f"{workers_of_node}")


def test_a_head_without_cpus_takes_no_share_of_the_memory(
    write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (there,) = ray.nodes()
    head = {**there, "Resources": {k: v for k, v in there["Resources"].items() if k not in ("CPU", "GPU")}}
    gone = {**there, "Alive": False}
    monkeypatch.setattr(ray, "nodes", lambda: [head, there, gone])
    monkeypatch.setattr(driver, "Worker", Counted)
    environment = {"env_vars": {"NOTES": str(tmp_path)}}
    build(write(vectors(ROWS, DIM)), tmp_path / "run", ray_remote_args={"runtime_env": environment})
    assert {path.read_text() for path in tmp_path.glob("shares-*")} == {"2"}


@pytest.mark.parametrize(
    ("nodes", "asked", "workers", "most"),
    [
        ([{}, {"CPU": 16}, {"CPU": 16}, {"CPU": 16}], {}, 8, 3),
        ([{"CPU": 16}] * 4, {}, 8, 2),
        # Where the others are full.
        ([{"CPU": 8}, {"CPU": 64}], {"num_cpus": 8}, 6, 5),
        ([{"CPU": 64}, {"CPU": 64, "GPU": 8}], {"num_gpus": 1}, 4, 4),
        ([{"CPU": 64, "GPU": 1}, {"CPU": 64, "GPU": 8}], {"num_gpus": 1}, 4, 3),
        ([{"CPU": 64, "GPU": 8}] * 2, {"num_gpus": 0.5}, 8, 4),
        ([{}, {}], {"num_cpus": 0}, 4, 2),
        ([{"CPU": 8}, {"CPU": 8, "tpu": 4}], {"resources": {"tpu": 1}}, 3, 3),
        ([{"CPU": 8}, {"CPU": 8, "accelerator_type:H200": 1}], {"accelerator_type": "H200"}, 3, 3),
        ([{"CPU": 8, "memory": 4e9}, {"CPU": 8, "memory": 64e9}], {"memory": 8 << 30}, 3, 3),
        # Where they go is the caller's to say, and may be one machine.
        ([{"CPU": 64}] * 4, {"scheduling_strategy": "DEFAULT"}, 8, 8),
        ([{"CPU": 2}] * 4, {"num_cpus": 1, "label_selector": {"zone": "a"}}, 8, 2),
    ],
)
def test_workers_of_one_machine(
    nodes: list[dict[str, float]], asked: dict[str, Any], workers: int, most: int
) -> None:
    there = [{"Alive": True, "Resources": resources} for resources in nodes]
    assert _ray_nodes.most_on_a_node(there, asked, workers) == most


def test_workers_are_spread_where_the_caller_does_not_say_where_they_go() -> None:
    """A placement group that the caller runs in is where its actors go, and may be on one machine."""
    assert _ray_nodes.spread({"num_gpus": 1}, in_group=False) == {"scheduling_strategy": "SPREAD"}
    assert _ray_nodes.spread({"num_gpus": 1}, in_group=True) == {}
    assert _ray_nodes.spread({"label_selector": {"zone": "a"}}, in_group=False) == {}
    there = [{"Alive": True, "Resources": {"CPU": 64}}] * 4
    assert _ray_nodes.most_on_a_node(there, {}, 8, in_group=True) == 8


def test_workers_of_a_caller_in_a_placement_group_stay_in_it(
    write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: "its own")

    class Recorded:
        def options(self, **options: Any) -> Any:
            asked.append(options)
            raise InterruptedError

    monkeypatch.setattr(ray, "remote", lambda _: Recorded())
    with pytest.raises(InterruptedError):
        build(write(vectors(ROWS, DIM)), tmp_path / "run")
    assert "scheduling_strategy" not in asked[0]


def test_a_sample_of_all_workers_is_no_smaller_than_a_model_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draws a share that is rounded up; where it is hardly enough, one worker draws all."""
    monkeypatch.setattr(driver, "_awaited", lambda _, task: task)
    asked: list[int] = []

    def drawing(_: Any, rows: int) -> int:
        asked.append(rows)
        # Outliers.
        return rows - rows // 1000

    def drawn(most: int, num_workers: int) -> int | None:
        asked.clear()
        workers: list[Any] = []

        def start() -> None:
            fitting = SimpleNamespace(remote=lambda: (10_000, most))
            workers.append(SimpleNamespace(fitting=fitting, sample=SimpleNamespace(remote=drawing)))

        start()
        shards = [SimpleNamespace(num_rows=rows) for rows in (1001, 2003, 3001, 4999)]
        plan = SimpleNamespace(num_partitions=2000, num_bits=8, shards=shards, num_rows=11_004)
        parts = driver._sample(None, SimpleNamespace(plan=plan), start, workers, num_workers)  # type: ignore[arg-type]
        return None if parts is None else sum(rows - rows // 1000 for rows in asked)

    for most in (1999, 2000, 2001, 2003, 2010, 2022, 2024, 2030, 5000):
        for num_workers in (2, 3, 4):
            found = drawn(most, num_workers)
            assert found is None or found >= 2000, (most, num_workers)
    assert drawn(2000, 3) is None and drawn(2030, 3) is not None


def test_workers_that_fit_the_cluster_and_none_of_its_machines(
    write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would wait for a machine that is large enough for ever."""
    (there,) = ray.nodes()
    small = {**there, "Resources": {**there["Resources"], "CPU": 2.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [small, small])
    ds = write(vectors(ROWS, DIM))
    for options, match in (
        ({"num_workers": 1, "ray_remote_args": {"num_cpus": 4}}, "no machine of the cluster has 4 CPU"),
        ({"num_workers": 1, "ray_remote_args": {"num_cpus": 3}}, "no machine of the cluster has 3 CPU"),
    ):
        with pytest.raises(la.InvalidInputError, match=match):
            build(ds, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_workers_that_do_not_all_fit_at_once_are_as_many_as_fit(
    write: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The others are not waited for."""
    (there,) = ray.nodes()
    large = {**there, "Resources": {**there["Resources"], "CPU": 3.0}}
    small = {**there, "Resources": {**there["Resources"], "CPU": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [large, small])
    ds = write(vectors(ROWS, DIM))
    with caplog.at_level(logging.WARNING, "lance_artifact"):
        build(ds, tmp_path / "run", num_workers=2, ray_remote_args={"num_cpus": 2})
    assert [r.getMessage() for r in caplog.records if "have room for" in r.getMessage()] == [
        "of 2 workers of 2 CPU the machines of the cluster have room for 1 at once; the others begin when there is more"
    ]
    assert ds.stats.index_stats("vector_idx")["num_indexed_rows"] == ROWS
