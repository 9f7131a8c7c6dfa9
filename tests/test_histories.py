"""Random histories: what a plain list of rows says is what an exhaustive search finds, after every step."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest

import histories
from history_model import HistoryError, check

COUNT = int(os.environ.get("LANCE_ARTIFACT_HISTORIES", "500"))


def test_random_histories(capsys: pytest.CaptureFixture[str]) -> None:
    """New ones every time; a failing one is printed with the seed that runs it again."""
    seed = int(os.environ.get("LANCE_ARTIFACT_HISTORY_SEED", int(time.time()) * 1000))
    results = histories.many(COUNT, seed, max(2, os.cpu_count() or 2))
    with capsys.disabled():
        print(f"\n{histories.summary(results)}\n  seeds from {seed}")
    failed = [r for r in results if r["failure"]]
    shown = "\n".join(
        histories.describe(r) + f"again: scripts/histories --seed {r['seed']}" for r in failed[:3]
    )
    assert not failed, f"{len(failed)} of {COUNT} histories failed\n{shown}"
    # It would be right, too, never to commit anything.
    count: Counter[str] = histories.totals(results)
    for kind, share in (
        ("create", 0.8),
        ("stale", 0.15),
        ("meanwhile", 0.4),
        ("finalize", 0.15),
        ("chdir", 0.7),
    ):
        all_of_it = sum(n for k, n in count.items() if k.startswith(f"{kind}: "))
        assert count[f"{kind}: committed"] >= share * all_of_it, (kind, count)
    for kind in (*histories.OTHERS, *histories.OURS):
        assert count[kind], f"no history had a step {kind!r}"


def test_a_history_can_be_run_again(tmp_path: Path) -> None:
    first, again = (histories.one(3, str(tmp_path)) for _ in range(2))
    assert first["log"] == again["log"] and len(first["log"]) > 3


def test_the_check_finds_what_is_wrong(tmp_path: Path) -> None:
    """A harness that finds nothing proves nothing: rows that the list does not have, has too many of, or has otherwise."""
    there = Path.cwd()
    history = histories.History(11, tmp_path)
    try:
        history.run()
    finally:
        os.chdir(there)
        histories.tempfile.tempdir = None
    arguments = (history.metric, history.dtype, history.query)
    rows = history.live
    check(history.root, history.line, rows, *arguments)
    some = next(i for i, v in rows.items() if v is not None)
    for wrong in (
        {i: v for i, v in rows.items() if i != some},
        {**rows, 987_654: rows[some]},
        {**rows, some: rows[some] + 1},
    ):  # type: ignore[operator]
        with pytest.raises(HistoryError):
            check(history.root, history.line, wrong, *arguments)
