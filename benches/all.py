"""Every CPU benchmark, as one table: `just bench all`, or `just bench quick` at sizes that end within ten minutes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _common
import build
import finalize
import handover
import scale


def writer(rows: int, runs: int) -> list[dict[str, Any]]:
    """The Rust bench; empty where there is no cargo."""
    if shutil.which("cargo") is None:
        print("\nwriter alone: not measured, it needs cargo")
        return []
    with tempfile.TemporaryDirectory(prefix="writer-") as folder:
        path = Path(folder, "writer.json")
        arguments = [str(rows), "1024", str(runs), "--json", str(path)]
        command = ["cargo", "bench", "--quiet", "--bench", "writer", "--", *arguments]
        subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
        found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def main(arguments: list[str]) -> None:
    quick = "quick" in arguments
    print(f"{_common.machine()}\n{_common.versions()}", flush=True)
    rows, runs = (1_000_000, 3) if quick else (handover.ROWS, 5)
    results = handover.measure(rows, runs)
    results += writer(rows, runs)
    results += finalize.measure(rows, runs)
    results += scale.measure(scale.shapes([1, 4] if quick else [1, 4, 16, 32]))
    shapes = (
        ((100_000, 256, 128, 32, None, None), (200_000, 128, 256, 16, None, None)) if quick else build.SHAPES
    )
    for shape in shapes:
        results += build.measure(*shape, 2 if quick else 3, build.peers([]))
    _common.report(results, Path("bench.json"))


if __name__ == "__main__":
    main(sys.argv[1:])
