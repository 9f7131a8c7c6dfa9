"""What a command says of its work: lines while it goes on, and figures of what it did."""

from __future__ import annotations

import logging
import resource
import sys
import time
from typing import Any

import click

from .._log import EXTRA

# Seconds between two lines where there is no terminal.
EVERY = 10.0


class Lines:
    """A line every ten seconds: stage, what is done, rate, and how long the stage still takes."""

    def __init__(self, every: float = EVERY) -> None:
        self._every = every
        self._stage = ""
        self._began = self._last = time.monotonic()

    def __call__(self, step: Any) -> None:
        now = time.monotonic()
        if step.event == "start" or step.stage != self._stage:
            # Of a stage that others began: its rate is counted from here.
            self._stage, self._began, self._from = step.stage, now, step.completed or 0
        if now - self._last < self._every or step.event == "complete":
            return
        self._last = now
        done = (step.completed or 0) - self._from
        seconds = now - self._began
        rate = done / seconds if seconds > 0 else 0.0
        total = f" of {step.total:,}" if step.total else ""
        left = f", {(step.total - step.completed) / rate:,.0f} s left" if step.total and rate > 0 else ""
        click.echo(f"{step.stage}: {step.completed or 0:,}{total} {step.unit}, {rate:,.0f}/s{left}", err=True)


class Stages(logging.Handler):
    """Collects the fields that stages log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.events: list[dict[str, Any]] = []
        self._began = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, EXTRA, None)
        if fields:
            self.events.append(fields)

    def of(self, event: str) -> list[dict[str, Any]]:
        return [fields for fields in self.events if fields["event"] == event]

    def figures(self) -> dict[str, Any]:
        """Backend, seconds by stage, rows dropped by reason, and the most memory the process held, of what was done."""
        names = {"trained": "train", "encoded": "encode", "built": "build"}
        seconds: dict[str, float] = {}
        dropped: dict[str, int] = {}
        for event, name in names.items():
            for fields in self.of(event):
                seconds[name] = round(seconds.get(name, 0.0) + fields["seconds"], 3)
        for fields in (*self.of("encoded"), *self.of("taken")):
            for reason, rows in fields.get("dropped", {}).items():
                dropped[reason] = dropped.get(reason, 0) + rows
        backends = sorted({fields["backend"] for fields in self.events if fields.get("backend")})
        seconds["total"] = round(time.monotonic() - self._began, 3)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assigned = [{k: v for k, v in fields.items() if k != "event"} for fields in self.of("assigned")]
        return {
            "backend": ", ".join(backends) or None,
            "seconds": seconds,
            "rows_dropped": dropped,
            **({"assignment": assigned[-1]} if assigned else {}),
            "peak_memory": peak if sys.platform == "darwin" else peak * 1024,
        }


def figures_text(figures: dict[str, Any]) -> str:
    seconds = ", ".join(f"{name} {value:,.1f} s" for name, value in figures["seconds"].items())
    lost = ", ".join(f"{rows:,} {reason}" for reason, rows in figures["rows_dropped"].items() if rows)
    backend = f"backend {figures['backend']}; " if figures["backend"] else ""
    assigned = figures.get("assignment", {})
    if assigned.get("method") == "groups":
        backend += f"not with their nearest centroid {assigned['missed']} of {assigned['checked']:,} rows that were checked; "
    return f"  {backend}{seconds}; rows dropped: {lost or 'none'}; peak memory {figures['peak_memory'] / 2**20:,.0f} MiB"
