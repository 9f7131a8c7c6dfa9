"""Every CPU benchmark, as one table: `just bench all`, or `just bench quick` at sizes that end within ten minutes."""

from __future__ import annotations

import sys
from pathlib import Path

import _common
import build
import handover


def main(arguments: list[str]) -> None:
    quick = "quick" in arguments
    print(f"{_common.machine()}\n{_common.versions()}")
    rows = handover.measure(1_000_000 if quick else handover.ROWS, 3 if quick else 5)
    shapes = ((100_000, 256, 128, 32, None), (200_000, 128, 256, 16, None)) if quick else build.SHAPES
    for shape in shapes:
        rows += build.measure(*shape, 2 if quick else 3, build.peers([]))
    _common.report(rows, Path("bench.json"))


if __name__ == "__main__":
    main(sys.argv[1:])
