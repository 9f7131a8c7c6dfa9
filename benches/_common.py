"""What the benchmarks share: the machine, processes of their own, and their peak memory."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> str:
    """Processor, cores and memory, in words."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
        model += " with AVX-512" if "avx512f" in flags else ""
    except (OSError, StopIteration):
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def versions() -> dict[str, str]:
    """Of what is measured."""
    from lance_artifact import __version__

    return {
        "lance-artifact": __version__,
        **{name: version(name) for name in ("pylance", "pyarrow", "numpy")},
    }


def resident() -> int:
    """Resident bytes of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def settle() -> None:
    """Let the disk finish what earlier runs wrote and deleted: it would be part of the next run's time."""
    os.sync()
    time.sleep(2)


class Peak:
    """Seconds, and the highest resident memory above that at the start, of a block."""

    def __enter__(self) -> Peak:
        self.start = self.highest = resident()
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        self._began = time.perf_counter()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            self.highest = max(self.highest, resident())

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self._stop.set()
        self._watch.join()
        self.bytes = max(self.highest, resident()) - self.start


def row(
    goal: str, ours: float, peer: float, ratio: float, unit: str, limit: float | None = None
) -> dict[str, Any]:
    """A line of the report. `limit` is what the machine can do at all, in `unit`, where that was measured."""
    return {"goal": goal, "ours": ours, "peer": peer, "ratio": ratio, "limit": limit, "unit": unit}


def report(rows: list[dict[str, Any]], path: Path) -> None:
    """Print the goals as a table, and write them as JSON: goal, ours, peer, ratio, limit, unit, machine, versions."""
    print(f"\n{machine()}; {', '.join(f'{name} {number}' for name, number in versions().items())}\n")
    print("| goal | ours | peer | ratio | the machine's limit | unit |\n|---|---|---|---|---|---|")
    for line in rows:
        limit = "" if line["limit"] is None else f"{line['limit']:.3f}"
        print(
            f"| {line['goal']} | {line['ours']:.3f} | {line['peer']:.3f} | {line['ratio']:.3f} | {limit} | {line['unit']} |"
        )
        line.setdefault("machine", machine())
        line.setdefault("versions", versions())
    path.write_text(json.dumps(rows, indent=1))


def write_seconds(folder: str, size: int) -> float:
    """Seconds that the system takes to write so many bytes to a file, without waiting for the disk."""
    content = memoryview(bytes(size))
    began = time.perf_counter()
    with Path(folder, "plain").open("wb", buffering=0) as file:
        for start in range(0, size, 1 << 20):
            file.write(content[start : start + (1 << 20)])
    seconds = time.perf_counter() - began
    Path(folder, "plain").unlink()
    return seconds


def in_process(script: str, job: str, **arguments: Any) -> dict[str, Any]:
    """Run `job` of a benchmark in a process of its own, and return the JSON it prints last."""
    command = [sys.executable, script, "--job", job, "--arguments", json.dumps(arguments)]
    environment = {**os.environ, "LANCE_INCLUDE_VECTOR_CENTROIDS": "false", "LANCE_LOG": "error"}
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return result


def counts(arguments: list[str], what: str) -> list[int]:
    """The whole numbers that a benchmark is given."""
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("counts", nargs="*", type=int, metavar=what)
    found: list[int] = parser.parse_args(arguments).counts
    return found


def dispatch(jobs: dict[str, Callable[..., dict[str, Any]]], main: Callable[[list[str]], None]) -> None:
    """A benchmark is run without --job by people, and with it by `in_process`."""
    if "--job" in sys.argv:
        job = sys.argv[sys.argv.index("--job") + 1]
        arguments = json.loads(sys.argv[sys.argv.index("--arguments") + 1])
        print(json.dumps(jobs[job](**arguments)))
    else:
        main(sys.argv[1:])
