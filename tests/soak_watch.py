"""Open files, threads and memory of processes, seen from outside, and whether they stay what they are."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# How much a straight line may rise from the end of the warm-up to the end of a run. A step opens files and sockets, dozens at a store, and
# starts threads, and lets go of them: of these the line goes through the fewest of each window, which is what stays.
FILES, THREADS = 12, 32
WINDOWS = 20
# Of memory, in runs of so many seconds and more: allocators take a new arena now and then, after half an hour too.
MEMORY_SECONDS, MEMORY = 1800, 32 << 20
WARM_UP = 0.1
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Watched:
    """What was seen of one process: rows of seconds, open files, threads, bytes."""

    pid: int
    #: When it began its first step: on a busy machine imports alone take longer than the warm-up of a short run.
    begun: float | None = None
    seen: list[tuple[float, int, int, int]] = field(default_factory=list)

    def look(self, started: float) -> None:
        """Look once; a process that has ended is not looked at."""
        try:
            files = sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())
            stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        except OSError:
            return
        # Fields 20 and 24; a process that has ended and was not waited for has neither files nor threads of its own.
        if stat[0] not in "ZX":
            self.seen.append((time.monotonic() - started, files, int(stat[17]), int(stat[21]) * PAGE))

    def grown(self, seconds: float) -> dict[str, dict[str, float]]:
        """For each resource what it was on the average, at most, and by how much a straight line through it rises."""
        start = WARM_UP * seconds + (self.begun or 0.0)
        table = np.array([row for row in self.seen if row[0] >= start], dtype=float).reshape(-1, 4)
        found = {}
        for at, name in enumerate(("files", "threads", "memory"), start=1):
            values = table[:, at]
            rise = 0.0
            if len(values) > 2:
                times, stays = table[:, 0], values
                if name != "memory":
                    windows = np.array_split(np.arange(len(values)), min(WINDOWS, len(values)))
                    times = np.array([times[window].mean() for window in windows])
                    stays = np.array([values[window].min() for window in windows])
                slope = np.polyfit(times, stays, 1)[0]
                rise = float(slope * (table[-1, 0] - table[0, 0]))
            found[name] = {
                "samples": len(values),
                "first": float(values[: max(1, len(values) // 10)].mean()) if len(values) else 0.0,
                "last": float(values[-max(1, len(values) // 10) :].mean()) if len(values) else 0.0,
                "mean": float(values.mean()) if len(values) else 0.0,
                "most": float(values.max()) if len(values) else 0.0,
                "growth": rise,
            }
        return found


def curve(watched: Watched) -> list[list[float]]:
    """What was seen, at most 240 rows of it."""
    rows = watched.seen[:: max(1, len(watched.seen) // 240)]
    return [[round(row[0], 1), *row[1:]] for row in rows]


def not_flat(role: str, grown: dict[str, dict[str, float]], seconds: float) -> list[str]:
    """What of a process grew further than it may."""
    bounds = {"files": FILES, "threads": THREADS}
    if seconds >= MEMORY_SECONDS:
        bounds["memory"] = MEMORY
    return [
        f"{role}: {name} grew by {grown[name]['growth']:,.0f} in {seconds:.0f} s, bound {most:,}"
        for name, most in bounds.items()
        if grown[name]["growth"] > most
    ]


def lines(resources: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """The same as a table."""
    text = ["  process     open files, growth   threads, growth        memory, growth by the fit"]
    for role, grown in resources.items():
        f, t, m = grown["files"], grown["threads"], grown["memory"]
        text.append(
            f"  {role:<10} {f['mean']:7.1f} {f['growth']:+12.1f} {t['mean']:8.1f} {t['growth']:+8.1f} "
            f"{m['mean'] / 2**20:10.0f} MiB {m['growth'] / 2**20:+8.1f} MiB"
        )
    return text
