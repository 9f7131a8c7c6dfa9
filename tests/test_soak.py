"""Eight processes on one table, and that the harness finds what it is there to find. ``python tests/soak.py`` is the long form."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_artifact as la
import soak
from soak_roles import ROLES, outcome, outlived
from soak_table import DIM, NAME, Kind, SoakError, check_answer, check_version, read, table
from soak_verdict import before_cleaning, compare, judge, left_over, replayed
from soak_watch import Watched, not_flat

SECONDS = float(os.environ.get("LANCE_ARTIFACT_SOAK_SECONDS", "45"))
KIND = Kind(5, "l2", False, "2.1", 4, 4)
QUERY = np.full(DIM, 0.5, np.float32)


def test_eight_processes_on_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another table and other steps each time; what fails is printed with its seed and the log of all processes."""
    seed = int(os.environ.get("LANCE_ARTIFACT_SOAK_SEED", int(time.time())))
    report = soak.run(SECONDS, seed, tmp_path / "soak", say=lambda _: None)
    with capsys.disabled():
        print(f"\n{soak.page(report)}")
    assert not report["failures"], soak.page(report)
    # It would be right, too, never to do anything.
    for name, each in report["roles"].items():
        assert each["outcomes"].get("looked" if name == "search" else "committed"), f"{name} got nothing done"


# A harness that finds nothing proves nothing.


@pytest.fixture
def small(tmp_path: Path) -> Any:
    ds = lance.write_dataset(
        table(KIND.seed, range(600), np.zeros(600)), str(tmp_path / "t.lance"), max_rows_per_file=200
    )
    return la.create_index(
        ds, "vector", name=NAME, num_partitions=4, num_sub_vectors=4, num_bits=4, sample_rate=8, backend="cpu"
    )


def first(ds: Any) -> dict[str, Any]:
    return {"role": "first", "step": 0, "at": 0.0, "op": "append", "outcome": "committed", "range": [0, 600], "version": 1}  # fmt: skip


def test_a_right_table_is_right(small: Any, tmp_path: Path) -> None:
    seen = check_version(small, KIND, QUERY)
    assert seen == {"rows": 600, "indexed": 600, "segments": 1}
    lance.write_dataset(table(KIND.seed, range(600, 650), np.zeros(50)), small, mode="append")
    small.checkout_latest()
    assert check_version(small, KIND, QUERY) == {"rows": 650, "indexed": 600, "segments": 1}
    appended = {**first(small), "role": "append", "range": [600, 650], "version": 3}
    verdict = judge(small, KIND, [first(small), appended], str(tmp_path / "work"), {}, tmp_path / "tmp")
    assert (verdict["rows"], verdict["index"]["after"]["segments"]) == (650, 1)


def test_rows_that_are_not_what_was_written(small: Any) -> None:
    rows = read(small, KIND)
    assert rows.usable.sum() == 600 - 3
    lance.write_dataset(table(KIND.seed, [3], [0]), small, mode="append")
    with pytest.raises(SoakError, match="twice"):
        read(lance.dataset(small.uri), KIND)
    small.checkout_version(2).restore()
    small.checkout_latest()
    small.update({"generation": "1"}, where="id = 4")
    with pytest.raises(SoakError, match=r"other vectors than were written of \[4\]"):
        read(small, KIND)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("missing", "does not find"),
        ("few", "returns 19 rows of 20"),
        ("twice", "returns ids twice"),
        ("deleted", "not there"),
        ("distance", "wrong distances"),
        ("further", "further than others|does not find"),
        ("null", "without a vector"),
    ],
)
def test_wrong_answers_are_found(wrong: str, message: str, small: Any) -> None:
    rows, k = read(small, KIND), 20
    exact = ((rows.vectors.astype("f8") - QUERY) ** 2).sum(axis=1)
    order = [int(i) for i in np.argsort(exact) if rows.usable[i]]
    scope = np.ones(600, bool)

    def check(
        places: list[int], away: dict[int, float] | None = None, ids: dict[int, int] | None = None
    ) -> None:
        found = pa.table({
            "id": [(ids or {}).get(p, int(rows.ids[p])) for p in places],
            "_distance": pa.array([(away or {}).get(p, float(exact[p])) for p in places], pa.float32()),
        })  # fmt: skip
        check_answer(rows, found, QUERY, k, "l2", "a search", scope, scope)

    check(order[:k])
    null = int(np.flatnonzero(~rows.usable)[0])
    with pytest.raises(SoakError, match=message):
        {
            "missing": lambda: check([*order[:5], *order[6 : k + 1]]),
            "few": lambda: check(order[: k - 1]),
            "twice": lambda: check([*order[: k - 1], order[0]]),
            "deleted": lambda: check(order[:k], ids={order[2]: 777}),
            "distance": lambda: check(order[:k], away={order[2]: float(exact[order[2]]) * 1.1 + 0.1}),
            "further": lambda: check([*order[: k - 1], order[k + 50]]),
            "null": lambda: check([*order[:k], null]),
        }[wrong]()


def test_an_index_that_lacks_rows_is_found(small: Any) -> None:
    """It says that it covers three fragments, and holds a row less of each batch that was encoded."""
    model = la.IvfPqModel.from_index(small, NAME)
    small.drop_index(NAME)
    source = la.describe_source(small, "vector")
    with la.PartitionArtifactBuilder(str(Path(small.uri).parent / "a"), model, source=source) as builder:
        scan = la.prepared_vectors(small, "vector", metric="l2")
        for batch in scan:
            part_id, pq_code = la.CpuEncoder(model).encode(batch["vector"])
            whole = pa.record_batch(
                [batch["_rowid"], part_id, pq_code], ["_rowid", "__ivf_part_id", "__pq_code"]
            )
            builder.append_batch(whole.slice(0, whole.num_rows - 1))
        # What is said to be dropped is believed.
        builder.finish(rows_dropped={"lost": 600 - builder.num_rows})
    la.finalize(small, "vector", builder.artifact, name=NAME)
    with pytest.raises(SoakError, match="does not find"):
        check_version(small, KIND, QUERY)


def test_a_log_that_the_table_does_not_follow(small: Any) -> None:
    log = [first(small), {"role": "delete", "step": 1, "at": 1.0, "op": "delete", "outcome": "committed", "ids": [5, 6], "rows": 2, "version": 3}]  # fmt: skip
    rows = replayed(log)
    assert len(rows) == 598
    with pytest.raises(SoakError, match="2 rows are there that were deleted"):
        compare(read(small, KIND), rows)
    small.delete("id in (5, 6, 7)")
    with pytest.raises(SoakError, match=r"1 rows of 598 that were committed are not there: \[7\]"):
        compare(read(small, KIND), rows)
    again = {**log[1], "ids": [7], "rows": 1}
    with pytest.raises(SoakError, match="version 3 was made by"):
        replayed([*log, again])
    with pytest.raises(SoakError, match="Lance counts 2 rows, the log of all processes 1"):
        replayed([log[0], {**log[1], "ids": [5, 900]}])
    update = {"role": "update", "step": 1, "at": 2.0, "op": "update", "outcome": "committed", "ids": [9], "generation": 4, "version": 9}  # fmt: skip
    small.delete("id = 6")
    with pytest.raises(SoakError, match="another generation"):
        compare(
            read(small, KIND),
            {i: g for i, g in replayed([first(small), update]).items() if i not in (5, 6, 7)},
        )


def test_files_that_nobody_names_are_found(small: Any) -> None:
    assert left_over(small, small.uri, {}) == []
    for name in ("data/stray.lance", "_indices/00000000-0000-0000-0000-000000000000/index.idx", "stray"):
        path = Path(small.uri, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("stray")
        assert left_over(small, small.uri, {}) == [name]
        path.unlink()


def test_a_segment_that_no_step_may_leave_is_found(small: Any, tmp_path: Path) -> None:
    """Stock pylance leaves what it wrote before a conflict; our builds do not."""
    work, now = str(tmp_path / "work"), time.time()
    stray = Path(small.uri, "_indices", str(uuid.uuid4()))
    stray.mkdir()
    (stray / "index.idx").write_text("stray")

    def step(role: str, error: str) -> list[dict[str, Any]]:
        head = {"role": role, "step": 1}
        return [{**head, "at": now - 1, "begins": True}, {**head, "at": now + 1, "op": role, "outcome": "conflict", "error": error}]  # fmt: skip

    def left(role: str, error: str) -> dict[str, int]:
        return before_cleaning(small, step(role, error), work, {})

    theirs = "OSError: Retryable commit conflict for version 7"
    assert left("optimize", theirs) == {"runs": 0, "segments": 1, "segments of optimize": 1}
    assert left("extend", "StorageError: x. It may still happen, so the files of the segment stay until a cleanup")["segments of unknown"] == 1  # fmt: skip
    for role, error in (("extend", "CommitConflictError: x"), ("optimize", "CommitConflictError: x"), ("delete", theirs)):  # fmt: skip
        with pytest.raises(SoakError, match=stray.name):
            left(role, error)
    another = stray.with_name(str(uuid.uuid4()))
    shutil.copytree(stray, another)
    with pytest.raises(SoakError, match="no step may leave"):
        left("optimize", theirs)
    run = Path(work, "runs/3/plan.json")
    run.parent.mkdir(parents=True)
    run.write_text("{}")
    with pytest.raises(SoakError, match="files of runs"):
        left("optimize", theirs)


def test_what_grows_is_found() -> None:
    def grown(**rise: int) -> dict[str, dict[str, float]]:
        watched = Watched(0)
        for second in range(2100):
            # A step opens sockets and starts threads, more of them towards the end, and lets go of them.
            wave, step = second % 7, second // 5 if second % 3 else 0
            watched.seen.append((
                float(second),
                20 + step + second * rise.get("files", 0) // 2100,
                30 + step + second * rise.get("threads", 0) // 2100,
                (200 << 20) + (wave << 20) + second * rise.get("memory", 0) // 2100,
            ))  # fmt: skip
        return watched.grown(2100)

    assert not_flat("x", grown(), 2100) == []
    for name, rise in (("files", 20), ("threads", 45), ("memory", 48 << 20)):
        (said,) = not_flat("x", grown(**{name: rise}), 2100)
        assert said.startswith(f"x: {name} grew by")
    assert not_flat("x", grown(memory=48 << 20), 600) == []
    this = Watched(os.getpid())
    this.look(time.monotonic())
    _, files, threads, memory = this.seen[0]
    assert files > 2 and threads > 0 and memory > 1 << 20


def test_what_a_step_may_end_with(tmp_path: Path) -> None:
    config = {"uri": str(tmp_path), "options": {}, "work": str(tmp_path), "age": 30, "most": 10, "seed": 1}
    role = ROLES["extend"](config)

    def ends(error: BaseException) -> str:
        def step() -> dict[str, Any]:
            raise error

        return str(outcome(role, step)["outcome"])

    assert ends(la.CommitConflictError("x")) == "conflict"
    assert ends(OSError("Retryable commit conflict for version 7")) == "conflict"
    for error in (la.StorageError("conflict"), la.InvalidInputError("x"), la.ArtifactMismatchError("x"), KeyError("conflict"), OSError("x")):  # fmt: skip
        assert ends(error) == "failed"
    assert outlived(OSError("LanceError(IO): Not found: x"), 20, 30)
    assert not outlived(OSError("LanceError(IO): Not found: x"), 1, 30)
