"""Processes that end at any moment, and what goes on after them. ``python tests/kills.py`` is the long form."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    # A harness that finds nothing proves nothing.
    segment = "_indices/00000000-0000-0000-0000-000000000000"
    for place in (run, f"{run}/shards/00000/partitions", str(kills.temporary(ds)), f"{ds.uri}/{segment}"):
        stray = Path(place, "stray")
        stray.parent.mkdir(exist_ok=True)
        stray.write_text("stray")
        with pytest.raises(AssertionError, match="stray"):
            kills.left_over(ds, run, expected, {})
        stray.unlink()
    for name in kills.SEGMENT:
        Path(ds.uri, segment, name).write_text("whole")
    ds.checkout_latest()
    left = kills.left_over(ds, run, expected, {})
    assert left["segments killed at their commit"] >= 1 and not Path(ds.uri, segment).exists()
