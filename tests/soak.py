"""Eight processes on one table, for as long as is asked, with every answer checked.

``python tests/soak.py --seconds 3600 [--s3] [--seed S]``. One process each appends, deletes, updates (merge-insert and update),
compacts and cleans old versions, builds, extends and merges the index, optimizes it with stock pylance, and searches. Each search takes
one version, reads its rows by brute force, and must find just the nearest of them. At the end the table is compared with the log of what
all have committed, the index with the encoder row by row, and what is on the disk with what the table names; open files, threads and memory
of each process must have stayed what they were. `test_soak.py` is the short form.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")
os.environ.setdefault("LANCE_LOG", "error")

import lance
import numpy as np

import lance_artifact as la
from local_s3 import BUCKET, s3_server
from soak_roles import ROLES
from soak_table import NAME, Kind, SoakError, opened, table
from soak_verdict import Entry, entries, judge, shown
from soak_watch import Watched, curve, lines, not_flat

FIRST_ROWS, MOST_ROWS = 5000, 12_000
# A step that takes longer hangs.
HANGS = 300.0
# Of the log of all processes, what is printed where one failed.
SHOWN = 60


def age_of(seconds: float, s3: bool) -> float:
    """Seconds that old versions are kept: longer than any step reads one."""
    return 90.0 if s3 else 30.0 if seconds < 300 else 60.0


def begin(uri: str, options: dict[str, str], kind: Kind, logs: Path) -> None:
    """The table that all begin with, and its index."""
    rows = table(kind.seed, np.arange(FIRST_ROWS), np.zeros(FIRST_ROWS))
    ds = lance.write_dataset(
        rows, uri, storage_options=options or None, max_rows_per_file=FIRST_ROWS // 3,
        enable_stable_row_ids=kind.stable, data_storage_version=kind.storage,
    )  # fmt: skip
    first = {
        "at": time.time(), "role": "first", "step": 0, "op": "append", "outcome": "committed", "range": [0, FIRST_ROWS],
        "version": int(ds.version), "seconds": 0.0,
    }  # fmt: skip
    (logs / "first.jsonl").write_text(json.dumps(first) + "\n", encoding="utf-8")
    la.create_index(
        ds, "vector", name=NAME, metric=kind.metric, num_partitions=kind.partitions, num_sub_vectors=4, num_bits=kind.bits,
        sample_rate=32, max_iters=5, backend="cpu",
    )  # fmt: skip


class Processes:
    """The processes of a soak: started, watched, and ended."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.logs = folder, Path(config["logs"])
        self.stop = Path(config["stop"])
        path = folder / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        # What each of a process's threads keeps of what it freed looks like growth for hours.
        environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "MALLOC_ARENA_MAX": "2"}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        for name in ROLES:
            command = [sys.executable, str(Path(__file__).with_name("soak_roles.py")), name, str(path)]
            with self.said(name).open("wb") as said:
                self.running[name] = subprocess.Popen(command, stdout=said, stderr=said, env=environment)

    def said(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    def faults(self) -> list[str]:
        """Processes that ended before they were told to, and steps that do not end."""
        found = []
        for name, process in self.running.items():
            if process.poll() is not None and (process.returncode or not self.stop.exists()):
                found.append(f"{name} ended with {process.returncode}: {self.last_words(name)}")
            elif process.returncode is None and self.waited(name) > HANGS:
                process.send_signal(signal.SIGUSR1)
                time.sleep(1)
                found.append(
                    f"{name} hangs in its step of {self.waited(name):.0f} s: {self.last_words(name)}"
                )
        return found

    def has_begun(self, name: str) -> bool:
        """Whether a process has logged that it began a step."""
        log = self.logs / f"{name}.jsonl"
        return log.exists() and log.stat().st_size > 0

    def waited(self, name: str) -> float:
        """Seconds since a process last logged anything."""
        log = self.logs / f"{name}.jsonl"
        return time.time() - log.stat().st_mtime if log.exists() else 0.0

    def last_words(self, name: str) -> str:
        failed = [e for e in entries(self.logs) if e["role"] == name and e.get("outcome") == "failed"]
        said = self.said(name).read_text(encoding="utf-8", errors="replace")[-4000:]
        return "\n".join([*(f"{e['error']}\n{e['trace']}" for e in failed[-1:]), said])

    def end(self) -> list[str]:
        """Let each finish its step; what does not is killed and named."""
        self.stop.touch()
        deadline = time.monotonic() + HANGS
        found = []
        for name, process in self.running.items():
            try:
                process.wait(timeout=max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGUSR1)
                time.sleep(1)
                found.append(f"{name} did not end: {self.last_words(name)}")
                process.kill()
                process.wait()
        return found


def run(
    seconds: float, seed: int, folder: Path, s3: bool = False, say: Callable[[str], Any] = print
) -> dict[str, Any]:
    """A soak in a folder. The report; what is wrong is in its ``failures``."""
    store: AbstractContextManager[dict[str, str]] = s3_server() if s3 else nullcontext({})
    with store as options:
        return _run(seconds, seed, folder, options, say)


def _run(
    seconds: float, seed: int, folder: Path, options: dict[str, str], say: Callable[[str], Any]
) -> dict[str, Any]:
    kind, base = Kind.of(seed), f"s3://{BUCKET}" if options else str(folder)
    uri, work = f"{base}/t.lance", f"{base}/work"
    config: dict[str, Any] = {
        "uri": uri, "options": options, "work": work, "logs": str(folder / "logs"), "stop": str(folder / "stop"),
        "seed": seed, "age": age_of(seconds, bool(options)), "most": MOST_ROWS,
    }  # fmt: skip
    for name in ("logs", "tmp"):
        (folder / name).mkdir(parents=True)
    report: dict[str, Any] = {
        "seed": seed, "seconds": seconds, "store": "s3" if options else "local", "table": str(kind), "failures": [],
    }  # fmt: skip
    failures: list[str] = report["failures"]
    say(f"soak of {seconds:.0f} s, seed {seed}, {report['store']}: {kind}")
    begin(uri, options, kind, folder / "logs")
    processes = Processes(folder, config)
    watched = {name: Watched(process.pid) for name, process in processes.running.items()}
    started, every, told = time.monotonic(), (1.0 if seconds < 300 else 5.0), 0.0
    try:
        while (now := time.monotonic() - started) < seconds and not failures:
            for name, each in watched.items():
                if each.begun is None and processes.has_begun(name):
                    each.begun = now
                each.look(started)
            failures += processes.faults()
            if now - told >= 60:
                told = now
                say(f"  {now:.0f} s: {dict(sorted(_outcomes(entries(folder / 'logs')).items()))}")
            time.sleep(min(every, max(0.0, seconds - now)))
    finally:
        failures += processes.end()
    failures += [fault for fault in processes.faults() if fault not in failures]
    log = entries(folder / "logs")
    report["roles"] = summed(log)
    report["resources"] = {name: each.grown(seconds) for name, each in watched.items()}
    report["curves"] = {name: curve(each) for name, each in watched.items()}
    for name, grown in report["resources"].items():
        failures += not_flat(name, grown, seconds)
    # What failed is looked at as it is: judging merges the index and cleans up.
    if not failures:
        try:
            report["verdict"] = judge(opened(uri, options), kind, log, work, options, folder / "tmp")
        except SoakError as error:
            failures.append(f"at the end: {error}")
        except Exception:
            failures.append(f"at the end: {traceback.format_exc()}")
    report["log"] = [shown(entry) for entry in log[-SHOWN:]] if failures else []
    return report


def _outcomes(log: list[Entry]) -> Counter[str]:
    return Counter(e["outcome"] for e in log if "outcome" in e)


def summed(log: list[Entry]) -> dict[str, dict[str, Any]]:
    """What came of each process's steps."""
    found: dict[str, dict[str, Any]] = {}
    for name in ROLES:
        done = [e for e in log if e["role"] == name and "outcome" in e]
        took = [e["seconds"] for e in done] or [0.0]
        found[name] = {
            "steps": len(done),
            "outcomes": dict(_outcomes(done)),
            "operations": dict(
                Counter(e["op"] for e in done if e["outcome"] not in ("conflict", "outlived", "failed"))
            ),
            "conflicts": dict(Counter(e["error"].split(":")[0] for e in done if e["outcome"] == "conflict")),
            "median_seconds": statistics.median(took),
            "most_seconds": max(took),
        }
    return found


def page(report: dict[str, Any]) -> str:
    """A report for people."""
    text = [
        f"soak of {report['seconds']:.0f} s, seed {report['seed']}, {report['store']}: {report['table']}",
        "  process     steps  committed  looked  nothing  conflicts  outlived   median s   most s",
    ]
    for name, each in report["roles"].items():
        counts = [
            each["outcomes"].get(key, 0) for key in ("committed", "looked", "nothing", "conflict", "outlived")
        ]
        text.append(
            f"  {name:<10} {each['steps']:>6} {counts[0]:>10} {counts[1]:>7} {counts[2]:>8} {counts[3]:>10} {counts[4]:>9} "
            f"{each['median_seconds']:>10.2f} {each['most_seconds']:>8.2f}"
        )
    text += lines(report["resources"])
    if "verdict" in report:
        found = report["verdict"]
        text.append(
            f"  at the end version {found['version']}: {found['rows']:,} rows as all logs say, {found['index']['codes_compared']:,} codes compared, "
            f"no file left over; before cleaning up {found['before_cleaning']}"
        )
    text += [f"  FAILED: {failure}" for failure in report["failures"]]
    if report["failures"]:
        text += ["  the last steps of all processes:", *(f"    {line}" for line in report["log"])]
        text.append(f"  again: python tests/soak.py --seconds {report['seconds']:.0f} --seed {report['seed']}" + (" --s3" if report["store"] == "s3" else ""))  # fmt: skip
    else:
        text.append("  nothing failed")
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument(
        "--seed", type=int, help="of the table and of each process; default by the clock, printed"
    )
    parser.add_argument("--s3", action="store_true", help="on an S3 server of this machine")
    parser.add_argument("--report", type=Path, default=Path("soak.json"))
    parser.add_argument("--keep", action="store_true", help="keep the folder with the table and the logs")
    args = parser.parse_args()
    seed = int(time.time()) if args.seed is None else args.seed
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        report = run(args.seconds, seed, folder, args.s3)
        args.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(page(report))
    finally:
        if args.keep:
            print(f"kept {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
