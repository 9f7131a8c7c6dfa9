"""The table of a soak: rows whose vectors follow from their ids, and what any search of any version of it must find."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from history_model import distances

DIM, NAME = 16, "v"
# Of every so many ids one has no vector, which no index holds.
NULL_EVERY, NULL_AT = 199, 7
# Ids from here on are made by upserts, those below by appends.
UPSERTED = 1 << 40


class SoakError(AssertionError):
    """The table or a search of it is not what its rows say."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise SoakError(what)


@dataclass(frozen=True)
class Kind:
    """The kind of table and index that a seed makes."""

    seed: int
    metric: str
    stable: bool
    storage: str
    bits: int
    partitions: int

    @classmethod
    def of(cls, seed: int) -> Kind:
        pick = random.Random(seed)
        return cls(
            seed,
            pick.choice(["l2", "l2", "cosine", "dot"]),
            pick.random() < 0.5,
            pick.choice(["2.0", "2.1", "2.1", "2.2"]),
            pick.choice([4, 8]),
            pick.choice([4, 8, 16]),
        )

    def __str__(self) -> str:
        ids = "stable" if self.stable else "address"
        return f"{self.metric}, {ids} row ids, storage {self.storage}, {self.bits} bits, {self.partitions} partitions"


def vectors(seed: int, ids: np.ndarray, generations: np.ndarray) -> np.ndarray:
    """The vectors of rows: around 32 centers, and another one for each id and generation."""
    x = ids.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
    x = x + generations.astype(np.uint64)[:, None] * np.uint64(0xD1B54A32D192ED03)
    x = x + np.arange(DIM, dtype=np.uint64) * np.uint64(0x8CB92BA72F3D8DD7) + np.uint64(seed % 2**32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    noise = ((x ^ (x >> np.uint64(31))) >> np.uint64(40)).astype(np.float64) / 2**24
    centers = np.random.default_rng(seed).standard_normal((32, DIM)) * 3
    values: np.ndarray = (centers[ids % 32] + 3 * (noise - 0.5)).astype(np.float32)
    return values


def has_vector(ids: np.ndarray) -> np.ndarray:
    found: np.ndarray = ids % NULL_EVERY != NULL_AT
    return found


def table(seed: int, ids: Any, generations: Any) -> pa.Table:
    """Rows as they are written."""
    ids, generations = np.asarray(ids, np.int64), np.asarray(generations, np.int32)
    values = pa.array(vectors(seed, ids, generations).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, DIM, mask=pa.array(~has_vector(ids)))
    return pa.table(
        {"id": pa.array(ids), "generation": pa.array(generations), "vector": column, "extra": pa.array(ids)}
    )


@dataclass(frozen=True)
class Rows:
    """All rows of one version, read without an index.

    Attributes
    ----------
    ids, generations, fragments : (n,) arrays
    vectors : (n, DIM) float32
        Of rows without one, zeros.
    usable : (n,) bool
        Whether an index must have the row.
    """

    ids: np.ndarray
    generations: np.ndarray
    fragments: np.ndarray
    vectors: np.ndarray
    usable: np.ndarray


def read(ds: Any, kind: Kind) -> Rows:
    """Read a version, and compare each row with what its id and generation say.

    Raises
    ------
    SoakError
        A row is there twice, or is not what was written.
    """
    there = ds.to_table(columns=["id", "generation", "vector", "extra"], with_row_address=True)
    ids, generations = there["id"].to_numpy(), there["generation"].to_numpy()
    where = f"version {ds.version}"
    expect(len(np.unique(ids)) == len(ids), f"{where}: a scan returns ids twice: {_few(_twice(ids))}")
    usable = has_vector(ids)
    column = there["vector"].combine_chunks()
    null = np.asarray(column.is_null())
    expect(
        bool((null == ~usable).all()), f"{where}: vectors are null, or not, of {_few(ids[null == usable])}"
    )
    values = np.zeros((len(ids), DIM), np.float32)
    values[usable] = column.drop_null().flatten().to_numpy().reshape(-1, DIM)
    otherwise = (values != vectors(kind.seed, ids, generations)).any(axis=1) & usable
    expect(not otherwise.any(), f"{where}: other vectors than were written of {_few(ids[otherwise])}")
    moved = there["extra"].to_numpy() != ids
    expect(not moved.any(), f"{where}: the column extra is of other rows at {_few(ids[moved])}")
    return Rows(ids, generations, there["_rowaddr"].to_numpy() >> 32, values, usable)


def check_answer(
    rows: Rows,
    found: pa.Table,
    query: np.ndarray,
    k: int,
    metric: str,
    how: str,
    covered: np.ndarray,
    scope: np.ndarray,
) -> None:
    """Compare an answer with the exact one.

    Parameters
    ----------
    found : table of ``id`` and ``_distance``
    covered : (n,) bool
        Rows of fragments that the index covers. Others are scanned, and a scan may also return rows without a vector.
    scope : (n,) bool
        The rows of which the k nearest must be found. Other usable rows may be found too.

    Raises
    ------
    SoakError
        A row is missing, deleted, there twice or at another distance; or nearer ones were passed over. Of equal ones any may be found.
    """
    ids, away = found["id"].to_numpy(), found["_distance"].to_numpy()
    expect(len(np.unique(ids)) == len(ids), f"{how} returns ids twice: {_few(_twice(ids))}")
    order = np.argsort(rows.ids)
    at = np.minimum(np.searchsorted(rows.ids, ids, sorter=order), len(order) - 1)
    place = order[at]
    gone = rows.ids[place] != ids
    expect(not gone.any(), f"{how} returns rows that are not there: {_few(ids[gone])}")
    without = ~rows.usable[place]
    strange = without & covered[place]
    expect(not strange.any(), f"{how} returns rows without a vector: {_few(ids[strange])}")
    place, ids, away = place[~without], ids[~without], away[~without]
    exact = distances(query, rows.vectors, metric) if metric != "cosine" else _cosine(query, rows)
    slack = 1e-3 * np.maximum(1.0, np.abs(exact))
    off = np.abs(away - exact[place]) > slack[place]
    expect(
        not off.any(),
        f"{how} returns wrong distances of {_few(ids[off])}: {list(zip(away[off][:3], exact[place[off]][:3], strict=True))}",
    )
    must = rows.usable & scope
    wanted = min(k, int(must.sum()))
    if wanted == 0:
        return
    last = np.partition(exact[must], wanted - 1)[wanted - 1]
    nearer = must & (exact < last - slack)
    missing = np.setdiff1d(rows.ids[nearer], ids, assume_unique=True)
    expect(
        not len(missing),
        f"{how} does not find {_few(missing)} of the {wanted} nearest rows; {_whose(rows, missing, covered)}",
    )
    expect(len(ids) >= wanted, f"{how} returns {len(ids)} rows of {wanted} that there are")
    if scope.all():
        further = exact[place] > last + slack[place]
        expect(not further.any(), f"{how} returns rows that are further than others: {_few(ids[further])}")


def _whose(rows: Rows, missing: np.ndarray, covered: np.ndarray) -> str:
    """The fragments of rows that were not found, and how many rows with a vector each has."""
    lost = np.isin(rows.ids, missing)
    found = []
    for fragment in np.unique(rows.fragments[lost]):
        of = rows.fragments == fragment
        state = "covered" if covered[of].all() else "not covered"
        found.append(f"{(of & lost).sum()} of {(of & rows.usable).sum()} of fragment {fragment} ({state})")
    return ", ".join(found)


def _cosine(query: np.ndarray, rows: Rows) -> np.ndarray:
    """Rows without a vector have no direction."""
    filled = np.where(rows.usable[:, None], rows.vectors, 1.0)
    return distances(query, filled, "cosine")


def segments(ds: Any) -> dict[str, frozenset[int]]:
    """The segments of the index, and the fragments that each covers."""
    return {
        str(s.uuid): frozenset(s.fragment_ids)
        for i in ds.describe_indices()
        if i.name == NAME
        for s in i.segments
    }


def check_version(ds: Any, kind: Kind, query: np.ndarray, k: int = 10) -> dict[str, int]:
    """Read the rows of a version by brute force and compare what its index finds: the k nearest, all of them, and those indexed.

    Returns
    -------
    dict
        What was looked at.
    """
    rows, parts = read(ds, kind), segments(ds)
    where = f"version {ds.version}"
    expect(bool(parts), f"{where}: there is no index")
    covering = frozenset().union(*parts.values())
    covered = np.isin(rows.fragments, list(covering))
    everything = np.ones(len(rows.ids), bool)
    total = len(rows.ids)
    statistics = ds.stats.index_stats(NAME)
    indexed, open_ = statistics["num_indexed_rows"], statistics["num_unindexed_rows"]
    expect(indexed + open_ == total, f"{where}: {indexed} rows indexed and {open_} not, of {total}")
    expect(indexed == covered.sum(), f"{where}: {indexed} rows indexed, its fragments have {covered.sum()}")
    # In a table of stable row ids that was compacted, Lance lets entries of deleted rows take places among the nearest.
    held = sum(part["size"] for each in statistics["indices"] for part in each["partitions"])
    factor = -(-(total + held) // k) + 1

    def search(k: int, refine: int, **options: Any) -> pa.Table:
        nearest = {
            "column": "vector", "q": query, "k": k, "nprobes": kind.partitions, "refine_factor": refine, "metric": kind.metric,
        }  # fmt: skip
        return ds.scanner(
            columns=["id", "_distance"], nearest=nearest, disable_scoring_autoprojection=True, **options
        ).to_table()

    several = f"with {len(parts)} segments"
    how = f"{where}: a search of the {k} nearest {several}"
    check_answer(rows, search(k, factor), query, k, kind.metric, how, covered, everything)
    every = total + held + 10
    how = f"{where}: a search of all rows {several}"
    check_answer(rows, search(every, 1), query, every, kind.metric, how, covered, everything)
    if covered.any():
        how = f"{where}: a search of the index alone {several}"
        # Of the index's own rows: one that was updated may be found by the code that it had.
        found = search(every, 1, fast_search=True, index_segments=list(parts))
        check_answer(rows, found, query, every, kind.metric, how, everything, covered)
    return {"rows": total, "indexed": int(covered.sum()), "segments": len(parts)}


def opened(uri: str, options: dict[str, str] | None, session: Any = None) -> Any:
    return lance.dataset(uri, storage_options=options or None, session=session)


def _twice(ids: np.ndarray) -> np.ndarray:
    found, counts = np.unique(ids, return_counts=True)
    twice: np.ndarray = found[counts > 1]
    return twice


def _few(ids: Any) -> str:
    listed = sorted(int(i) for i in ids)
    return f"{listed[:8]}" + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
