"""One side of two releases of pylance: what one has made, the other uses, and we take over.

    python tests/across.py make FOLDER    indexes of pylance and of ours, in datasets of one folder
    python tests/across.py use FOLDER     pylance alone opens, searches, appends and optimizes each of them
    python tests/across.py take FOLDER    we append, extend and merge each of them
    python tests/across.py read FOLDER    pylance alone searches each of them

Each prints one JSON object: for each step "ok" or what happened. `scripts/matrix --across` goes through all pairs of releases.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from matrix import NEW, ROWS, K, M, recall, table, vectors

METRICS = ("l2", "cosine")
NAME = "vector_idx"


class Steps:
    """What came of each step. After one that failed those of the same dataset are not tried."""

    def __init__(self) -> None:
        self.results: dict[str, str] = {}

    def of(self, place: Path, *steps: tuple[str, Callable[[], Any]]) -> None:
        for name, work in steps:
            try:
                work()
                self.results[f"{place.name} {name}"] = "ok"
            except BaseException as error:
                self.results[f"{place.name} {name}"] = f"{type(error).__name__}: {str(error)[:300]}"
                return


def opened(place: Path) -> Any:
    import lance

    return lance.dataset(str(place))


def searched(place: Path) -> None:
    """Whether an index covers every row and finds what is nearest."""
    ds = opened(place)
    found = ds.to_table(columns=["id", "vector"])
    values = np.stack(found["vector"].to_numpy(zero_copy_only=False))[np.argsort(found["id"].to_numpy())]
    unindexed = ds.stats.index_stats(NAME)["num_unindexed_rows"]
    got = recall(ds, values, place.name.rsplit("-", 1)[-1])
    if unindexed or got < 0.95:
        raise AssertionError(f"{unindexed} rows are not indexed, recall {got}")


def appended(place: Path) -> None:
    import lance

    rows = opened(place).count_rows()
    lance.write_dataset(table(vectors(NEW, rows), rows), str(place), mode="append")


def optimized(place: Path) -> None:
    opened(place).optimize.optimize_indices()


def make(folder: Path, steps: Steps) -> None:
    import lance

    shape = {"num_partitions": K, "num_sub_vectors": M}
    for metric in METRICS:
        stock, ours = folder / f"stock-{metric}", folder / f"ours-{metric}"

        def of_stock(stock: Path = stock, metric: str = metric) -> None:
            ds = lance.write_dataset(table(vectors(ROWS, 1)), str(stock), max_rows_per_file=2000)
            ds.create_index("vector", "IVF_PQ", metric=metric, **shape)

        def of_ours(ours: Path = ours, metric: str = metric) -> None:
            import lance_artifact as la

            ds = lance.write_dataset(table(vectors(ROWS, 1)), str(ours), max_rows_per_file=2000)
            la.create_index(ds, "vector", metric=metric, backend="cpu", **shape)

        steps.of(stock, ("make", of_stock), ("search", lambda stock=stock: searched(stock)))
        steps.of(ours, ("make", of_ours), ("search", lambda ours=ours: searched(ours)))


def use(place: Path, steps: Steps) -> None:
    steps.of(
        place,
        ("open and search", lambda: searched(place)),
        ("append", lambda: appended(place)),
        ("optimize", lambda: optimized(place)),
        ("search optimized", lambda: searched(place)),
    )


def take(place: Path, steps: Steps) -> None:
    import lance_artifact as la

    def extended() -> None:
        assert la.extend_index(opened(place), NAME, backend="cpu").num_rows == NEW

    steps.of(
        place,
        ("append", lambda: appended(place)),
        ("extend", extended),
        ("search extended", lambda: searched(place)),
        ("merge", lambda: la.merge_segments(opened(place), NAME)),
        ("search merged", lambda: searched(place)),
    )


def read(place: Path, steps: Steps) -> None:
    steps.of(place, ("read", lambda: searched(place)))


def main() -> int:
    warnings.simplefilter("ignore")
    verb, folder = sys.argv[1], Path(sys.argv[2])
    steps = Steps()
    if verb == "make":
        make(folder, steps)
    else:
        # Stock's side must be stock's.
        each = {"use": use, "take": take, "read": read}[verb]
        for place in sorted(folder.iterdir()):
            each(place, steps)
        assert verb == "take" or "lance_artifact" not in sys.modules
    print(json.dumps({"steps": steps.results}))
    return 0 if all(result == "ok" for result in steps.results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
