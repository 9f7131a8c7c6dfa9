"""Exact search: which rows are nearest to queries, and whether a row that a search gives is as near as those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ._cancel import poll
from ._dataset import Handle, readable
from ._progress import Report

# Bytes of what is computed at a time, beside what a scan holds.
BLOCK_BYTES = 64 << 20
# Queries that are compared with a block of rows at a time; more where it has few rows.
BLOCK_QUERIES = 128
# Of a query and a row: a distance of each kind, a row id and its place, with copies.
PAIR_BYTES = 41
# What float32, in which searches compute, says of a distance, relative to the numbers that it is a sum of: the roundings of a sum in
# sixteen lanes grow no larger at any dimension that is in use.
ROUNDING = 16 * float(np.finfo(np.float32).eps)


class Exact:
    """The ``k`` rows nearest to each query, of the rows that an index of some fragments holds, found in one scan of the column.

    Distances are computed in float64. In float32 it is only seen, for most rows, that they are too far away.

    Parameters
    ----------
    handle : Handle
    path : str
        Of the column.
    metric : {"l2", "cosine", "dot"}
    fragment_ids : list of int
    queries : array (n, dimension)
    k : int
    own : bool
        Each query is a row of the table, which is not among what is to be found: of the rows at the least distance one is left out.
    report : Report, optional

    Attributes
    ----------
    rows : array (n, k) of int
        Row ids, the nearest first, and -1 where there are fewer rows.
    wanted : int
        How many rows there are to be found, of all queries.
    """

    def __init__(
        self,
        handle: Handle,
        path: str,
        metric: str,
        fragment_ids: list[int],
        queries: np.ndarray,
        k: int,
        own: bool = False,
        report: Report | None = None,
    ) -> None:
        self._handle, self._path, self._metric = handle, path, metric
        # Around a point among them: of numbers that are large beside their differences little would be left of those.
        center = np.median(queries, axis=0) if metric == "l2" else np.zeros(queries.shape[1], np.float32)
        self._center = center.astype(np.float64)
        self._asked = self._placed(queries)
        # One more, which says whether others are as near as the last.
        self._best = np.full((len(queries), k + own + 1), np.inf)
        self._found = np.full(self._best.shape, -1, np.int64)
        self._longest = 0.0
        self._scan(fragment_ids, report)
        order = np.argsort(self._best, axis=1, kind="stable")
        best, found = np.take_along_axis(self._best, order, 1), np.take_along_axis(self._found, order, 1)
        del self._best, self._found
        self._own = found[:, 0] if own else np.full(len(found), -1)
        self.rows = found[:, int(own) : -1]
        self.wanted = int((self.rows >= 0).sum())
        self._last = best[:, -2]
        others = np.isfinite(best[:, -1])
        self._tied = others.copy()
        self._tied[others] = best[others, -1] <= self._last[others] + self._rounding(
            self._last[others], np.sqrt(self._longest), others
        )

    def hits(self, query: int, found: Sequence[int] | np.ndarray) -> int:
        """How many of the rows that a search gave are among the nearest, or as near as the last of them in place of one that is no nearer."""
        given = np.unique(np.asarray(found, np.int64))
        given = given[given != self._own[query]]
        nearest = np.isin(given, self.rows[query])
        hits = int(nearest.sum())
        if self._tied[query]:
            wanted = self.rows[query][self.rows[query] >= 0]
            missed, others = wanted[~np.isin(wanted, given)], given[~nearest]
            as_near = (
                self._count(query, others, lambda beyond, rounding: beyond <= rounding) if len(missed) else 0
            )
            # For a row that is strictly nearer none of them makes up.
            if as_near:
                hits += min(as_near, self._count(query, missed, lambda beyond, rounding: beyond >= -rounding))
        return hits

    def _placed(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors as they are compared."""
        placed: np.ndarray = vectors.astype(np.float64)
        if self._metric == "cosine":
            norms = np.linalg.norm(placed, axis=1, keepdims=True)
            placed /= np.where(norms > 0, norms, 1)
        placed -= self._center
        return placed

    def _rounding(self, distances: np.ndarray, lengths: Any, queries: Any) -> Any:
        """What of distances to vectors of these lengths float32 does not tell."""
        of_query = np.linalg.norm(self._asked[queries], axis=-1)
        dimension = self._asked.shape[1]
        if self._metric == "dot":
            return ROUNDING * of_query * lengths
        # And what float64 leaves of numbers that are large beside it.
        exact = dimension * np.finfo(np.float64).eps * (np.square(of_query) + np.abs(distances))
        return exact + ROUNDING * (np.abs(distances) if self._metric == "l2" else 1.0)

    def _scan(self, fragment_ids: list[int], report: Report | None) -> None:
        source = self._handle.vectors(self._path, fragment_ids)
        total, seen = source.count_rows(), 0
        dimension = self._asked.shape[1]
        at_once = max(1, BLOCK_BYTES // (28 * dimension + PAIR_BYTES * BLOCK_QUERIES))
        if report:
            report("start", "exact", 0, total, "rows")
        for batch in source.scan(self._metric):
            for start in range(0, batch.num_rows, at_once):
                part = batch.slice(start, at_once)
                ids = part.column(0).to_numpy().astype(np.int64)
                self._compare(as_rows(part.column(1)), ids)
                poll()
            seen += batch.num_rows
            if report and batch.num_rows:
                report("progress", "exact", seen, total, "rows")
        if report:
            report("complete", "exact", total, total, "rows")

    def _compare(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        """Put those of a block of rows that are nearer into what was found."""
        with np.errstate(over="ignore", invalid="ignore"):
            # Numbers of float32 lose nothing to the center that is more than what is left of them.
            narrow = vectors.astype(np.float32, copy=False) if vectors.dtype != np.float64 else vectors
            rough = (narrow - self._center.astype(narrow.dtype)).astype(np.float32, copy=False)
            rough_squared = np.einsum("ij,ij->i", rough, rough)
        longest = float(rough_squared.max())
        self._longest = max(self._longest, longest)
        # No sum of so many products, in whatever order, is further from the truth than this, nor than what is lost of the smallest.
        dimension = vectors.shape[1]
        unsure, lost = (dimension + 16) * float(np.finfo(np.float32).eps), dimension * 1e-37
        several = max(
            BLOCK_QUERIES, BLOCK_BYTES // (28 * dimension + PAIR_BYTES * (len(vectors) + self._best.shape[1]))
        )
        for start in range(0, len(self._asked), several):
            asked = self._asked[start : start + several]
            best, found = (each[start : start + several] for each in (self._best, self._found))
            norms = np.linalg.norm(asked, axis=1)
            with np.errstate(over="ignore", invalid="ignore"):
                away = asked.astype(np.float32) @ rough.T
                if self._metric == "dot":
                    np.negative(away, out=away)
                    bound = best.max(axis=1) + 2 * unsure * norms * np.sqrt(longest) + lost
                else:
                    away *= -2
                    away += rough_squared
                    bound = best.max(axis=1) - np.square(norms)
                    bound += 2 * unsure * np.square(norms + np.sqrt(longest)) + lost
                # What is no number in float32 is one in float64.
                near = np.flatnonzero(~(away > bound[:, None]).all(axis=0))
            del away
            if not len(near):
                continue
            nearer = vectors[near].astype(np.float64) - self._center
            distances = -(asked @ nearer.T)
            if self._metric != "dot":
                distances *= 2
                distances += np.einsum("ij,ij->i", nearer, nearer)
                distances += np.square(norms)[:, None]
            all_best = np.concatenate([best, distances], axis=1)
            all_found = np.concatenate([found, np.broadcast_to(ids[near], distances.shape)], axis=1)
            del distances
            keep = np.argpartition(all_best, best.shape[1] - 1, axis=1)[:, : best.shape[1]]
            best[:] = np.take_along_axis(all_best, keep, 1)
            found[:] = np.take_along_axis(all_found, keep, 1)

    def _count(
        self, query: int, rows: np.ndarray, test: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> int:
        """Of how many of these rows a test holds, given how far they are beyond the last to be found, and its rounding."""
        count = 0
        at_once = max(1, BLOCK_BYTES // (40 * self._asked.shape[1]))
        for start in range(0, len(rows), at_once):
            named = ", ".join(map(str, rows[start : start + at_once].tolist()))
            with readable(f"rows of {self._handle.uri}"):
                table = self._handle.dataset.to_table(columns=[self._path], filter=f"_rowid IN ({named})")
            for chunk in table.column(0).chunks:
                vectors = as_rows(getattr(chunk, "storage", chunk).drop_null())
                count += int(test(*self._beyond(query, vectors)).sum())
        return count

    def _beyond(self, query: int, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How much further vectors are than the last, and the rounding of that."""
        vectors = self._placed(vectors)
        if self._metric == "dot":
            away = -(vectors @ self._asked[query])
        else:
            away = np.square(vectors - self._asked[query]).sum(axis=1)
        rounding = self._rounding(self._last[query], np.linalg.norm(vectors, axis=1), query)
        return away - self._last[query], rounding


def as_rows(array: Any) -> np.ndarray:
    """A fixed-size list as (rows, dimension), in the type of its elements."""
    values: np.ndarray = array.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(array), -1)
