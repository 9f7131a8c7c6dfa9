"""Inside other programs: logging, cancelling, asyncio, pickles."""

from __future__ import annotations

import asyncio
import logging
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

import lance_artifact as la
from conftest import column, leftovers, vectors
from lance_artifact._process import PREFIX

ROWS, DIM = 20_000, 32
SLOW: dict[str, Any] = {"num_partitions": 64, "num_sub_vectors": 16, "max_iters": 50, "backend": "cpu"}
QUICK: dict[str, Any] = {"num_partitions": 4, "num_sub_vectors": 4, "max_iters": 2, "backend": "cpu"}


@pytest.fixture
def ds(tmp_path: Path) -> Any:
    table = pa.table({"vector": column(vectors(ROWS, DIM))})
    return lance.write_dataset(table, str(tmp_path / "d.lance"), max_rows_per_file=5000)


def events(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.lance_artifact for record in caplog.records if hasattr(record, "lance_artifact")]


def test_stages_are_logged_with_counts_and_durations(
    ds: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lance_artifact")
    la.create_index(ds, "vector", artifact_uri=tmp_path / "a", **QUICK)
    found = events(caplog)
    assert [e["event"] for e in found] == [
        "trained.begins", "trained", "encoded.begins", "encoded", "built.begins", "built", "committed",
    ]  # fmt: skip
    by = {e["event"]: e for e in found}
    assert by["trained"]["backend"] == "cpu" and by["trained"]["seconds"] > 0
    assert by["encoded"]["rows"] == ROWS and by["encoded"]["dropped"] == {
        "null": 0,
        "non_finite": 0,
        "zero_norm": 0,
    }
    assert by["built"]["rows"] == by["committed"]["rows"] == ROWS
    assert by["committed"]["version"] == ds.version and by["committed"]["index"] == "vector_idx"
    assert {record.name for record in caplog.records} == {"lance_artifact"}, "Lance's own are for DEBUG"
    caplog.clear()
    la.create_index(ds.checkout_version(1), "vector", name="again", artifact_uri=tmp_path / "a", **QUICK)
    assert [e["event"] for e in events(caplog)] == ["taken", "built.begins", "built", "committed"]
    assert events(caplog)[0]["rows"] == ROWS


def test_what_lance_logs_comes_along(ds: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "lance_artifact")
    la.create_index(ds, "vector", "IVF_HNSW_PQ", ef_construction=20, m=4, **QUICK)
    graphs = [r for r in caplog.records if r.name == "lance_artifact.lance_index.vector.hnsw.builder"]
    assert len(graphs) >= QUICK["num_partitions"] and "Building HNSW graph" in graphs[0].getMessage()
    caplog.clear()
    caplog.set_level(logging.WARNING, "lance_artifact")
    la.create_index(ds, "vector", "IVF_HNSW_PQ", replace=True, ef_construction=20, m=4, **QUICK)
    assert caplog.records == []


def test_nothing_is_printed_by_itself(ds: Any) -> None:
    script = f"import lance_artifact as la; la.create_index({ds.uri!r}, 'vector', **{QUICK})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")


def ended_by(event: threading.Event, work: Callable[[], Any], after: float) -> float:
    """Seconds from setting the event to the end of the work."""
    set_at: list[float] = []

    def later() -> None:
        time.sleep(after)
        set_at.append(time.monotonic())
        event.set()

    thread = threading.Thread(target=later)
    thread.start()
    with la.cancel_on(event), pytest.raises(la.CancelledError):
        work()
    thread.join()
    return time.monotonic() - set_at[0]


@pytest.mark.parametrize("when", ["train_ivf", "train_quantizer", "shuffle", "merge_partitions"])
def test_an_event_ends_each_stage(
    when: str, ds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    before = leftovers(tmp_path)
    stop = threading.Event()

    def tell(step: Any) -> None:
        if step.stage == when:
            stop.set()

    with la.cancel_on(stop), pytest.raises(la.CancelledError, match="nothing was committed"):
        la.create_index(ds, "vector", progress=tell, **SLOW)
    assert ds.latest_version == 1 and leftovers(tmp_path) == before
    assert not [each for each in (tmp_path / "tmp").iterdir() if each.name.startswith(PREFIX)]
    # Outside of the block nothing is cancelled, and a build succeeds.
    la.create_index(ds, "vector", **QUICK)


def test_it_is_quick_also_in_a_thread(ds: Any) -> None:
    slow = {**SLOW, "num_partitions": 2000, "max_iters": 1000, "sample_rate": 10}
    assert ended_by(threading.Event(), lambda: la.create_index(ds, "vector", **slow), 0.3) < 5

    seconds: list[float] = []

    def inside() -> None:
        seconds.append(ended_by(threading.Event(), lambda: la.train(ds, "vector", **slow), 0.3))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seconds and seconds[0] < 5


def test_a_callable_and_what_is_none(ds: Any) -> None:
    with la.cancel_on(lambda: True), pytest.raises(la.CancelledError):
        la.train(ds, "vector", **SLOW)
    for wrong in (3, "x", None):
        with pytest.raises(la.InvalidTypeError, match="event"), la.cancel_on(wrong):  # type: ignore[arg-type]
            pass


def test_other_threads_are_not_cancelled(ds: Any) -> None:
    stop = threading.Event()
    stop.set()
    models: list[Any] = []
    with la.cancel_on(stop):
        thread = threading.Thread(target=lambda: models.append(la.train(ds, "vector", **QUICK)))
        thread.start()
        thread.join()
    assert len(models) == 1


def test_a_run_that_is_cancelled_goes_on(ds: Any, tmp_path: Path) -> None:
    stop = threading.Event()
    seen: list[str] = []

    def tell(step: Any) -> None:
        seen.append(step.stage)
        if seen.count("shuffle") > 2:
            stop.set()

    run = {"artifact_uri": tmp_path / "run", "resume": True, "num_shards": 4, **SLOW}
    with la.cancel_on(stop), pytest.raises(la.CancelledError):
        la.create_index(ds, "vector", progress=tell, **run)
    assert la.Run.open(tmp_path / "run").status().is_trained
    la.create_index(ds, "vector", **run)
    assert ds.describe_indices()[0].num_rows_indexed == ROWS


def test_awaiting(ds: Any) -> None:
    async def main() -> None:
        # Two at once, and the loop goes on meanwhile.
        first = la.in_thread(la.train, ds, "vector", seed=1, **QUICK)
        second = la.in_thread(la.train, ds, "vector", seed=1, **QUICK)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.005)

        ticking = asyncio.create_task(tick())
        models = await asyncio.gather(first, second)
        ticking.cancel()
        assert models[0] == models[1] and ticks > 1
        with pytest.raises(la.InvalidInputError):
            await la.in_thread(la.train, ds, "vector", num_partitions=0)
        task = asyncio.create_task(
            la.in_thread(la.create_index, ds, "vector", **{**SLOW, "num_partitions": 2000, "sample_rate": 10})
        )
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(
                la.in_thread(la.train, ds, "vector", **{**SLOW, "num_partitions": 2000, "sample_rate": 10}),
                0.2,
            )

    asyncio.run(main())
    assert ds.latest_version == 1


def test_results_pickle(ds: Any, tmp_path: Path) -> None:
    model = la.train(ds, "vector", **QUICK)
    artifact = la.build_artifact(ds, "vector", model, tmp_path / "a", backend="cpu")
    la.finalize(ds, "vector", artifact)
    plan = la.plan(ds, "vector", name="p", calibrate=False, **QUICK)
    report = la.evaluate(ds, "vector_idx", num_queries=5)
    lance.write_dataset(ds.head(100), ds.uri, mode="append")
    things: list[Any] = [
        model, plan, report, la.extend_index(ds, "vector_idx", backend="cpu"), la.merge_segments(ds, "vector_idx"),
        la.Run.create(plan, tmp_path / "run").status(), la.CancelledError("x"), la.InvalidTypeError("x"), la.UnsupportedError("x"),
    ]  # fmt: skip
    for thing in things:
        again = pickle.loads(pickle.dumps(thing))
        assert type(again) is type(thing) and str(again) == str(thing)
    assert pickle.loads(pickle.dumps(artifact)).uri == artifact.uri


def test_an_outer_event_counts_too(ds: Any) -> None:
    stop, never = threading.Event(), threading.Event()
    stop.set()
    with la.cancel_on(stop), la.cancel_on(never), pytest.raises(la.CancelledError):
        la.train(ds, "vector", **SLOW)

    async def main() -> None:
        with la.cancel_on(stop), pytest.raises(la.CancelledError):
            await la.in_thread(la.train, ds, "vector", **SLOW)

    asyncio.run(main())
    with la.cancel_on(stop), pytest.raises(la.CancelledError):
        la.create_index(ds, "vector", num_sub_vectors=4, train=False)
    assert ds.latest_version == 1


def test_a_run_that_is_committed_is_no_cancelled_one(
    ds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lance_artifact import _commit

    stop = threading.Event()
    look = _commit._commit_and_look

    def then_stop(*args: Any) -> None:
        look(*args)
        stop.set()

    monkeypatch.setattr(_commit, "_commit_and_look", then_stop)
    with la.cancel_on(stop):
        la.create_index(
            ds, "vector", artifact_uri=tmp_path / "run", resume=True, keep_artifact=False, **QUICK
        )
    assert ds.describe_indices()[0].num_rows_indexed == ROWS and not (tmp_path / "run").exists()


def test_a_handler_that_fails_fails_no_build(ds: Any) -> None:
    class Broken(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise RuntimeError("broken")

    logger, broken = logging.getLogger("lance_artifact"), Broken()
    logger.addHandler(broken)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        la.create_index(ds, "vector", **QUICK)
    finally:
        logger.removeHandler(broken)
        logger.setLevel(level)
    assert ds.describe_indices()[0].num_rows_indexed == ROWS
