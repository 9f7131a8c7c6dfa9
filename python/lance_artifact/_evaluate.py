"""`evaluate`: what searches of an index find, and what that costs."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _lance_artifact as core
from ._arguments import Progress
from ._calls import awaited
from ._checked import checked
from ._dataset import Handle
from ._exact import BLOCK_BYTES, Exact, as_rows
from ._fit import skew
from ._index import CommittedIndex
from ._lance_artifact import IvfPqModel
from ._log import LOGGER
from ._progress import Report, reporter
from .exceptions import InvalidInputError

if TYPE_CHECKING:
    import lance

# Settings that nobody names: powers of two until the recall does not grow any more, and these.
REFINE_FACTORS: tuple[int | None, ...] = (None, 4, 16)
# A recall that more partitions do not raise by more than this is as high as it gets.
SATURATED = 0.001


@dataclass(frozen=True)
class Setting:
    """What one setting of a search gives.

    Attributes
    ----------
    nprobes : int
    refine_factor : int or None
    recall : float
        Of the k nearest rows that are indexed, the share that is found; mean over the queries. A row that is as near as the last of
        them, as far as float32 tells, is as good.
    rows_scanned : float
        Rows of the partitions probed, mean over the queries.
    latency_ms : float
        Median of single searches, from this process.
    """

    nprobes: int
    refine_factor: int | None
    recall: float
    rows_scanned: float
    latency_ms: float


@dataclass(frozen=True)
class Evaluation:
    """Recall, rows scanned and latency of an index over a grid of settings. Printed as a table.

    Attributes
    ----------
    name : str
    num_queries, k : int
    num_rows : int
        Rows in the index, deleted ones too.
    num_partitions, num_segments, empty_partitions : int
    skew : float
        Rows of the fullest partition over the mean.
    variation : float
        Standard deviation of the partitions' rows over their mean.
    settings : tuple of Setting
    target_recall : float or None
    """

    name: str
    num_queries: int
    k: int
    num_rows: int
    num_partitions: int
    num_segments: int
    empty_partitions: int
    skew: float
    variation: float
    settings: tuple[Setting, ...]
    target_recall: float | None

    def cheapest(self, recall: float) -> Setting | None:
        """The setting with the lowest latency that reaches a recall; None where none does."""
        reach = [setting for setting in self.settings if setting.recall >= recall]
        return min(reach, key=lambda setting: setting.latency_ms, default=None)

    def to_json(self) -> str:
        """All of it, and the cheapest setting that reaches ``target_recall``."""
        content = dataclasses.asdict(self)
        found = None if self.target_recall is None else self.cheapest(self.target_recall)
        content["cheapest"] = None if found is None else dataclasses.asdict(found)
        return json.dumps(content, indent=1)

    def __str__(self) -> str:
        lines = [
            f"index {self.name!r}: {self.num_rows:,} rows in {self.num_partitions:,} partitions ({self.empty_partitions:,} empty), "
            f"{self.num_segments} segments",
            f"  balance: the fullest partition has {self.skew:.1f} times the mean, coefficient of variation {self.variation:.2f}",
            f"  recall@{self.k} of {self.num_queries} queries:",
            "  nprobes  refine  recall  rows scanned  latency",
        ]
        lines += [
            f"  {s.nprobes:7}  {s.refine_factor or '-':>6}  {s.recall:6.3f}  {s.rows_scanned:12,.0f}  {s.latency_ms:5.2f} ms"
            for s in self.settings
        ]
        if self.target_recall is not None:
            found = self.cheapest(self.target_recall)
            lines.append(
                f"  no setting reaches a recall of {self.target_recall}"
                if found is None
                else f"  for a recall of {self.target_recall}: nprobes={found.nprobes}, refine_factor={found.refine_factor}"
            )
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw recall against rows scanned, a line for each refine factor. Needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InvalidInputError('plot: needs matplotlib: pip install "lance-artifact[demo]"') from error
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axis = figure.subplots()
        for factor in sorted({s.refine_factor or 0 for s in self.settings}):
            points = [(s.rows_scanned, s.recall) for s in self.settings if (s.refine_factor or 0) == factor]
            axis.plot(
                *zip(*sorted(points), strict=True), marker="o", label=f"refine_factor {factor or 'none'}"
            )
        if self.target_recall is not None:
            axis.axhline(self.target_recall, color="gray", linestyle="--")
        axis.set(
            xscale="log",
            xlabel="rows scanned a query",
            ylabel=f"recall@{self.k}",
            title=f"{self.name}",
            ylim=(None, 1.01),
        )
        axis.grid(alpha=0.3)
        axis.legend()
        figure.savefig(path)


@awaited
@checked
def evaluate(
    dataset: lance.LanceDataset | str | Path,
    name: str,
    queries: Any = None,
    k: int = 10,
    *,
    num_queries: int = 100,
    nprobes: Sequence[int] | None = None,
    refine_factors: Sequence[int | None] | None = None,
    target_recall: float | None = None,
    seed: int = 0,
    progress: Progress = False,
) -> Evaluation:
    """Compare what an index finds with exact search, over a grid of ``nprobes`` and ``refine_factor``.

    Reads the column once, of the fragments that the index covers, and searches for every query with every setting. However many
    rows and queries there are, it holds 160 MiB at most beside what a scan does, and of each query 16 bytes for each element and 40 for
    each of its k rows.

    Parameters
    ----------
    dataset : lance.LanceDataset, LanceDB table, or path
        At its version.
    name : str
        Of an IVF_PQ or IVF_HNSW_PQ index, whoever built it.
    queries : array (n, dimension), optional
        Default: random rows of the table, each without itself among what is to be found.
    k : int, default 10
    num_queries : int, default 100
        Where queries are drawn.
    nprobes : sequence of int, optional
        Default: powers of two, as long as the recall grows.
    refine_factors : sequence of int or None, optional
        Default: none, 4 and 16.
    target_recall : float, optional
        The cheapest setting that reaches it is named.
    seed : int, default 0
        Of the queries.
    progress : bool or callable, default False

    Returns
    -------
    Evaluation
        ``print`` shows a table, ``plot(path)`` draws recall against rows scanned, ``to_json()`` is for machines.
    """
    handle = Handle.of(dataset)
    index = CommittedIndex.of(handle, name)
    model = core.model_of_index(handle.core, name)
    covered = sorted(index.covered())
    others = [
        i.name
        for i in handle.dataset.describe_indices()
        if list(i.fields) == [index.field_id] and i.name != name
    ]
    if others:
        raise InvalidInputError(
            f"name: column {index.path!r} has other indexes too, {others}, and a search cannot be told which one to use; drop them, or "
            "evaluate a version without them"
        )
    if not covered:
        raise InvalidInputError(f"name: index {name!r} covers no fragment that is there")
    report = reporter(progress)
    drawn = queries is None
    if drawn:
        asked = _rows(handle, index, model.metric, covered, num_queries, seed)
    else:
        asked = _given(queries)
        if asked.ndim != 2 or asked.shape[1] != model.dimension or not len(asked):
            raise InvalidInputError(f"queries: got shape {asked.shape}, expected (n, {model.dimension})")
        if not np.isfinite(asked).all():
            raise InvalidInputError("queries: got NaN or infinite values")
    # One that was drawn is its own nearest, and is left out; of dot a row need not be nearest to itself.
    own = drawn and model.metric != "dot"
    exact = Exact(handle, index.path, model.metric, covered, asked, k, own, report)
    sizes = np.array(core.partition_sizes(handle.core, name))
    settings = tuple(
        _settings(handle, index, model, asked, exact, k + own, sizes, nprobes, refine_factors, report)
    )
    return Evaluation(
        name,
        len(asked),
        k,
        int(sizes.sum()),
        len(sizes),
        len(index.segments),
        int((sizes == 0).sum()),
        skew(sizes),
        float(sizes.std() / sizes.mean()) if sizes.sum() else 0.0,
        settings,
        target_recall,
    )


# With every partition probed and this many times the rows refined, a sound index finds nearly all.
LOOKED, REFINED, SOUND = 32, 20, 0.7


def check_recall(dataset: lance.LanceDataset, name: str) -> None:
    """A quick form of it, for a build that wants to know that it worked."""
    handle = Handle.of(dataset)
    partitions = len(core.partition_sizes(handle.core, name))
    found = evaluate(
        dataset, name, num_queries=LOOKED, nprobes=[partitions], refine_factors=[REFINED]
    ).settings[0]
    LOGGER.info(
        "index %r: recall@10 of %d rows is %.3f with every partition probed", name, LOOKED, found.recall
    )
    if found.recall < SOUND:
        warnings.warn(
            f"index {name!r}: recall@10 of {LOOKED} random rows is only {found.recall:.3f} with every partition probed and "
            f"refine_factor={REFINED}: its codes say little of the vectors; more num_sub_vectors or another metric may fit them. See "
            "lance_artifact.evaluate",
            stacklevel=4,
        )


def _given(queries: Any) -> np.ndarray:
    try:
        return np.ascontiguousarray(np.asarray(queries, dtype=np.float32))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(
            f"queries: got {type(queries).__name__}, expected an array of floats: {error}"
        ) from error


def _rows(
    handle: Handle, index: CommittedIndex, metric: str, covered: list[int], count: int, seed: int
) -> np.ndarray:
    """Rows of the table, of those that an index holds: of cosine none without a direction."""
    source = handle.vectors(index.path, covered)
    sample = source.sample(min(count, source.count_rows()), metric, seed)
    if not len(sample):
        raise InvalidInputError("queries: the table has no row with a usable vector; pass some")
    return _matrix(sample)


def _matrix(array: Any) -> np.ndarray:
    return as_rows(array).astype(np.float32, copy=False)


def _prepared(model: IvfPqModel, queries: np.ndarray) -> np.ndarray:
    if model.metric != "cosine":
        return queries
    norms = np.linalg.norm(queries, axis=1, keepdims=True)
    return queries / np.where(norms > 0, norms, 1)


def _settings(
    handle: Handle,
    index: CommittedIndex,
    model: IvfPqModel,
    queries: np.ndarray,
    exact: Exact,
    k: int,
    sizes: np.ndarray,
    nprobes: Sequence[int] | None,
    refine_factors: Sequence[int | None] | None,
    report: Report | None,
) -> Iterator[Setting]:
    probed = _probed(model, queries, sizes)
    partitions = model.num_partitions
    grid = sorted({min(n, partitions) for n in nprobes}) if nprobes else _doubling(partitions)
    factors = list(refine_factors) if refine_factors is not None else list(REFINE_FACTORS)
    if any(factor is not None and factor < 1 for factor in factors) or any(n < 1 for n in grid):
        raise InvalidInputError("nprobes and refine_factors: expected at least 1")
    if report:
        report("start", "search", 0, len(grid) * len(factors), "settings")
    for row, factor in enumerate(factors):
        last = -1.0
        for column, count in enumerate(grid):
            recall, latency = _search(handle, index, model, queries, exact, k, count, factor)
            yield Setting(count, factor, recall, float(probed[count - 1]), latency)
            if report:
                report("progress", "search", row * len(grid) + column + 1, None, "settings")
            if not nprobes and count > 1 and recall - last < SATURATED:
                break
            last = recall
    if report:
        report("complete", "search", len(grid) * len(factors), None, "settings")


def _probed(model: IvfPqModel, queries: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Rows of the nearest partition, of the two nearest and so on, mean over the queries."""
    centroids = _matrix(model.ivf_centroids)
    rows = np.zeros(len(sizes))
    at_once = max(1, BLOCK_BYTES // (32 * len(sizes)))
    for start in range(0, len(queries), at_once):
        asked = _prepared(model, queries[start : start + at_once])
        away = -(asked @ centroids.T)
        if model.metric != "dot":
            away = 2 * away + np.square(centroids).sum(axis=1)
        rows += np.cumsum(sizes[np.argsort(away, axis=1, kind="stable")], axis=1).sum(axis=0)
    return rows / len(queries)


def _doubling(partitions: int) -> list[int]:
    grid = [2**i for i in range(partitions.bit_length()) if 2**i < partitions]
    return [*grid, partitions]


def _search(
    handle: Handle,
    index: CommittedIndex,
    model: IvfPqModel,
    queries: np.ndarray,
    exact: Exact,
    k: int,
    nprobes: int,
    refine_factor: int | None,
) -> tuple[float, float]:
    hits = 0
    times = []
    for number, query in enumerate(queries):
        nearest: dict[str, Any] = {
            "column": index.path,
            "q": query,
            "k": k,
            "metric": model.metric,
            "nprobes": nprobes,
        }
        if refine_factor is not None:
            nearest["refine_factor"] = refine_factor
        start = time.perf_counter()
        table = handle.dataset.to_table(
            columns=["_distance"], nearest=nearest, with_row_id=True, fast_search=True
        )
        times.append(time.perf_counter() - start)
        hits += exact.hits(number, table["_rowid"].to_numpy())
    return (hits / exact.wanted if exact.wanted else 1.0), 1000 * float(np.median(times))
