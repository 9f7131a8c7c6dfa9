"""What a history must be at any moment: a plain list of live rows, compared with what is on disk through fresh handles."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from lance.file import LanceFileReader

DIM = 8
Rows = dict[int, "np.ndarray | None"]
"""Live rows: id to vector, None where it is null."""


class HistoryError(AssertionError):
    """A history ended otherwise than a plain list of rows says."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise HistoryError(what)


def usable(vector: np.ndarray | None, metric: str) -> bool:
    """Whether an index must have the vector."""
    if vector is None or not np.isfinite(vector).all():
        return False
    return metric != "cosine" or float(np.linalg.norm(vector.astype("f8"))) > 0


def distances(query: np.ndarray, vectors: np.ndarray, metric: str) -> np.ndarray:
    q, v = query.astype("f8"), vectors.astype("f8")
    if metric == "l2":
        result: np.ndarray = ((v - q) ** 2).sum(axis=1)
    elif metric == "dot":
        result = 1 - v @ q
    else:
        result = 1 - (v @ q) / (np.linalg.norm(v, axis=1) * np.linalg.norm(q))
    return result


def table(rows: Rows, dtype: str) -> pa.Table:
    filled = [np.zeros(DIM, dtype) if v is None else v.astype(dtype) for v in rows.values()]
    values = np.concatenate(filled) if filled else np.zeros(0, dtype)
    null = np.array([v is None for v in rows.values()], dtype=bool)
    mask = pa.array(null) if null.any() else None
    ids = pa.array(list(rows), pa.int64())
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), DIM, mask=mask)
    return pa.table({"id": ids, "vector": vectors, "extra": ids})


def open_line(root: str | Path, line: str | None) -> Any:
    """A fresh handle of main (None) or of a branch."""
    ds = lance.dataset(str(root))
    return ds if line is None else ds.checkout_version((line, None))


def lines_of(root: Path) -> list[str | None]:
    tree = root / "tree"
    return [None, *sorted(p.name for p in tree.iterdir())] if tree.exists() else [None]


def index_folders(root: Path) -> set[str]:
    """Segments on disk, of all branches: folders in which there is a file."""
    found = [*root.glob("_indices/*/*"), *root.glob("tree/*/_indices/*/*")]
    return {p.parent.name for p in found}


def segments(ds: Any) -> dict[str, dict[str, frozenset[int]]]:
    """Index to segment to fragments covered."""
    return {
        i.name: {str(s.uuid): frozenset(s.fragment_ids) for s in i.segments} for i in ds.describe_indices()
    }


@dataclass
class State:
    """What a step that failed may not have changed."""

    lines: dict[str | None, tuple[int, dict[str, dict[str, frozenset[int]]]]] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, root: Path) -> State:
        state = cls(tags=sorted(lance.dataset(str(root)).tags.list()))
        for line in lines_of(root):
            ds = open_line(root, line)
            state.lines[line] = (int(ds.version), segments(ds))
        return state

    def without_versions(self) -> State:
        return State({line: (0, indices) for line, (_, indices) in self.lines.items()}, self.tags)


def referenced(root: Path, since: dict[str | None, int]) -> set[str]:
    """Segments that a version after the given one of its line names."""
    names: set[str] = set()
    for line in lines_of(root):
        ds = open_line(root, line)
        for version in ds.versions():
            number = version["version"]
            if number > since.get(line, 0):
                at = ds if number == ds.version else ds.checkout_version((line, number) if line else number)
                names |= {uuid for index in segments(at).values() for uuid in index}
    return names


def _search(ds: Any, query: np.ndarray, metric: str, k: int, **options: Any) -> dict[int, float]:
    found = ds.scanner(
        columns=["id", "_distance"],
        nearest={"column": "vector", "q": query, "k": k, "nprobes": 4096, "ef": 4 * k, "refine_factor": 2, "metric": metric},
        disable_scoring_autoprojection=True,
        **options,
    ).to_table()  # fmt: skip
    ids, distance = found["id"].to_pylist(), found["_distance"].to_pylist()
    expect(
        len(set(ids)) == len(ids), f"a search returns ids twice: {sorted(i for i in ids if ids.count(i) > 1)}"
    )
    return dict(zip(ids, distance, strict=True))


def check(root: Path, line: str | None, rows: Rows, metric: str, dtype: str, query: np.ndarray) -> None:
    """Every live row with a usable vector is found exactly once, with its distance, and nothing else is in an index."""
    ds = open_line(root, line)
    where = f"{line or 'main'} version {ds.version}"
    there = ds.to_table(columns=["id", "vector"], with_row_address=True, with_row_id=True)
    ids = there["id"].to_pylist()
    expect(sorted(ids) == sorted(rows), f"{where}: a scan returns {_differ(ids, rows)}")
    wanted = [i for i, v in rows.items() if usable(v, metric)]
    if not wanted:
        return
    exact = dict(
        zip(wanted, distances(query, np.stack([rows[i] for i in wanted]), metric), strict=True)  # type: ignore[misc]
    )
    fragment = dict(zip(ids, (a >> 32 for a in there["_rowaddr"].to_pylist()), strict=True))
    k = len(rows) + 10

    def agree(found: dict[int, float], how: str, at_least: set[int], covered: frozenset[int] | None) -> None:
        lost = at_least - found.keys()
        expect(not lost, f"{where}: {how} does not find {_few(lost)} of {len(at_least)} rows")
        strange = {i for i in found if i not in exact and (covered is None or fragment.get(i, -1) in covered)}
        expect(
            not strange, f"{where}: {how} finds {_few(strange)}, which are deleted or have no usable vector"
        )
        slack = 3e-2 if dtype == "float16" else 1e-3
        off = [
            i for i, d in found.items() if i in exact and abs(d - exact[i]) > slack * max(1.0, abs(exact[i]))
        ]
        expect(
            not off,
            f"{where}: {how} returns wrong distances of {_few(off)}: {[(found[i], exact[i]) for i in off[:3]]}",
        )

    indices = {n: s for n, s in segments(ds).items() if n.startswith("v")}
    graphs = {i.name for i in ds.describe_indices() if i.index_type == "IVF_HNSW_PQ"}
    row_id = dict(zip(ids, there["_rowid"].to_pylist(), strict=True))
    # A graph over codes does not promise a way to each of its rows; Lance's own remapping makes such ones. They must be in it.
    unreached: set[int] = set()
    for name, parts in indices.items():
        covered = frozenset().union(*parts.values())
        statistics = ds.stats.index_stats(name)
        live = sum(f in covered for f in fragment.values())
        expect(
            statistics["num_indexed_rows"] + statistics["num_unindexed_rows"] == len(rows),
            f"{where}: statistics of {name}: {statistics['num_indexed_rows']} + {statistics['num_unindexed_rows']} rows of {len(rows)}",
        )
        expect(
            statistics["num_indexed_rows"] == live,
            f"{where}: statistics of {name} count {statistics['num_indexed_rows']} rows, its fragments have {live}",
        )
        if not covered & set(fragment.values()):
            continue
        must = {i for i in wanted if fragment[i] in covered}
        found = _search(ds, query, metric, k, fast_search=True, index_segments=list(parts))
        if name in graphs and must - found.keys():
            inside = _stored(root, parts)
            unreached |= {i for i in must - found.keys() if row_id[i] in inside}
        agree(found, f"a search in {name}", must - unreached, None)
    # Rows of fragments that no index covers are scanned, and a scan may return vectors that no index takes.
    covers = [frozenset().union(*parts.values()) for parts in indices.values()]
    everywhere = frozenset.intersection(*covers) if covers else frozenset()
    agree(_search(ds, query, metric, k), "a search", set(wanted) - unreached, everywhere)


def _stored(root: Path, parts: Any) -> set[int]:
    """The row ids in the files of some segments."""
    folders = [
        f for uuid in parts for f in (*root.glob(f"_indices/{uuid}"), *root.glob(f"tree/*/_indices/{uuid}"))
    ]
    tables = [LanceFileReader(str(folder / "auxiliary.idx")).read_all().to_table() for folder in folders]
    return {i for table in tables for i in table["_rowid"].to_pylist()}


def _few(ids: Any) -> str:
    ids = sorted(ids)
    return f"{ids[:8]}" + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


def _differ(ids: list[int], rows: Rows) -> str:
    return f"{len(ids)} rows of {len(rows)}: missing {_few(rows.keys() - set(ids))}, too many {_few(set(ids) - rows.keys())}"
