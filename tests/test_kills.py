"""Processes that end at any moment, and what goes on after them. ``python tests/kills.py`` is the long form."""

from __future__ import annotations

from pathlib import Path

import kills


def test_a_build_that_is_killed_again_and_again(tmp_path: Path) -> None:
    expected, seconds = kills.undisturbed(str(tmp_path))
    killed = round_ = 0
    while killed < 4:
        ds, run = kills.dataset(str(tmp_path / f"ds{round_}")), str(tmp_path / f"run{round_}")
        killed += kills.until_done(ds, run, {}, 5, seconds, seed=round_)["kills"]
        kills.check(ds, run, expected, {})
        round_ += 1
        assert round_ < 20, "nothing was killed before it was done"
