"""The dataset of a history, and what others do to it: stock pylance's own operations, mirrored on a plain list of rows."""

from __future__ import annotations

import datetime
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lance
import numpy as np

import lance_artifact as la
from history_model import DIM, Rows, open_line, segments, table

NAMES = ("v_a", "v_b")


def _unless_gone(_: object, path: str, raised: Any) -> None:
    if not isinstance(raised[1], FileNotFoundError):
        raise raised[1]


@dataclass
class Kept:
    """A handle that was opened some steps ago."""

    dataset: Any
    line: str | None
    generation: int


@dataclass
class Made:
    """An artifact, and what it was made of."""

    uri: str
    line: str | None
    generation: int
    version: int
    right: bool
    options: dict[str, Any] = field(default_factory=dict)
    shards: list[str] = field(default_factory=list)


class Skip(Exception):
    """The step has nothing to work on."""


class Dataset:
    """A small random dataset, its branches, and the rows that each must have."""

    def __init__(
        self, seed: int, folder: Path, off: frozenset[str] = frozenset(), stock: bool = False
    ) -> None:
        self.seed, self.stock = seed, stock
        self.random, self.numpy = random.Random(seed), np.random.default_rng(seed)
        self.folder = folder
        self.root = folder / "here" / "d.lance"
        self.off = off
        self.log: list[str] = []
        self.count: Counter[str] = Counter()
        self.lines: dict[str | None, Rows] = {}
        self.snapshots: dict[tuple[str | None, int], Rows] = {}
        self.line: str | None = None
        self.generation = 0
        self.kept: list[Kept] = []
        self.made: list[Made] = []
        self.queue: list[str] = []
        self.next_id = 0
        self.name = 0
        self.trained = False
        pick = self.random.choice
        self.metric = pick(["l2", "l2", "cosine", "dot"])
        self.dtype = pick(["float32", "float32", "float32", "float16", "float64"])
        self.stable = self.random.random() < 0.4
        self.storage = pick(["2.0", "2.1", "2.1", "2.2"])
        self.unusable = pick([0, 0, 0.03, 0.2])
        self.bits = pick([4, 8])
        self.partitions = pick([1, 2, 3, 4])
        self.model: Any = None
        self.query = self.numpy.standard_normal(DIM).astype(self.dtype)

    # The dataset

    def rows(self, n: int) -> Rows:
        made: Rows = {}
        for _ in range(n):
            vector: Any = self.numpy.standard_normal(DIM).astype(self.dtype)
            if self.random.random() < self.unusable:
                vector = self.random.choice([None, vector * np.nan, vector * 0])
            made[self.next_id] = vector
            self.next_id += 1
        return made

    def write(self) -> None:
        self.root.parent.mkdir(parents=True, exist_ok=True)
        rows = self.rows(self.random.choice([30, 60, 90, 150]))
        fragments = self.random.choice([1, 2, 3, 4])
        lance.write_dataset(
            table(rows, self.dtype), str(self.root), max_rows_per_file=-(-len(rows) // fragments),
            enable_stable_row_ids=self.stable, data_storage_version=self.storage,
        )  # fmt: skip
        self.line, self.lines = None, {None: rows}
        self.snapshots.clear()
        self.remember()

    def fresh(self, line: Any = ...) -> Any:
        return open_line(self.root, self.line if line is ... else line)

    @property
    def live(self) -> Rows:
        return self.lines[self.line]

    def remember(self, line: Any = ...) -> None:
        line = self.line if line is ... else line
        self.snapshots[(line, int(self.fresh(line).version))] = dict(self.lines[line])

    def some(self, least: int = 1, most: int = 20) -> list[int]:
        if not self.live:
            raise Skip
        return self.random.sample(list(self.live), min(len(self.live), self.random.randint(least, most)))

    # What others do

    def append(self) -> str:
        rows = self.rows(self.random.choice([1, 5, 40]))
        lance.write_dataset(
            table(rows, self.dtype), self.fresh(), mode="append", data_storage_version=self.storage
        )
        self.live.update(rows)
        return f"{len(rows)} rows"

    def delete(self) -> str:
        ids = self.some()
        if self.random.random() < 0.3:
            fragments = self.fresh().get_fragments()
            chosen = self.random.choice(fragments) if fragments else None
            ids = chosen.to_table(columns=["id"])["id"].to_pylist() if chosen else ids
        self.fresh().delete(f"id in ({', '.join(map(str, ids))})")
        for i in ids:
            del self.live[i]
        return f"{len(ids)} rows"

    def update_id(self) -> str:
        ids = self.some(1, 8)
        offset = self.next_id
        self.fresh().update({"id": f"id + {offset}"}, where=f"id in ({', '.join(map(str, ids))})")
        for i in ids:
            self.live[i + offset] = self.live.pop(i)
        self.next_id = max(self.next_id, max(self.live) + 1)
        return f"{len(ids)} rows"

    def _merge(self, columns: list[str]) -> str:
        ids = self.some(1, 10)
        changed = dict(zip(ids, self.rows(len(ids)).values(), strict=True))
        data = table(changed, self.dtype).select(columns)
        self.fresh().merge_insert("id").when_matched_update_all().execute(data)
        if "vector" in columns:
            self.live.update(changed)
        return f"{len(ids)} rows"

    def update_vector(self) -> str:
        return self._merge(["id", "vector", "extra"])

    def rewrite_vector(self) -> str:
        return self._merge(["id", "vector"])

    def rewrite_extra(self) -> str:
        return self._merge(["id", "extra"])

    def columns(self) -> str:
        ds = self.fresh()
        if "more" in ds.schema.names:
            ds.drop_columns(["more"])
            return "dropped"
        ds.add_columns({"more": "id * 2"})
        ds.drop_columns(["more"])
        return "added and dropped"

    def compact(self) -> str:
        if self.line is not None:
            own = {p.name for p in (self.root / "tree" / self.line).glob("_indices/*")}
            # Lance's own fault: an index that a branch has from its parent cannot be read after a compaction on the branch.
            if not {uuid for index in segments(self.fresh()).values() for uuid in index} <= own:
                raise Skip
        target = self.random.choice([50, 1000])
        self.fresh().optimize.compact_files(target_rows_per_fragment=target)
        return f"to fragments of {target}"

    def optimize(self) -> str:
        try:
            self.fresh().optimize.optimize_indices()
        except OSError as error:
            # Lance's own fault, with stock's indexes too: so few new rows that its shuffle has no file for a partition.
            if "/ivf_" not in str(error):
                raise
            return "which Lance could not"
        return ""

    def stock_index(self) -> str:
        name = self.random.choice(NAMES)
        model = self.given()
        self.fresh().create_index(
            "vector", "IVF_PQ", name=name, metric=self.metric, replace=True, num_partitions=self.partitions, num_sub_vectors=2,
            num_bits=self.bits, ivf_centroids=model.ivf_centroids, pq_codebook=model.pq_codebook,
        )  # fmt: skip
        return name

    def branch(self) -> str:
        name = f"b{len(self.log)}"
        if name in self.lines:
            raise Skip
        self.fresh().create_branch(name)
        self.lines[name] = dict(self.live)
        self.remember(name)
        if self.random.random() < 0.6:
            self.line = name
            return f"{name}, and went there"
        return name

    def switch(self) -> str:
        if len(self.lines) < 2:
            raise Skip
        self.line = self.random.choice([n for n in self.lines if n != self.line])
        return f"to {self.line or 'main'}"

    def tag(self) -> str:
        name, ds = f"t{len(self.log)}", self.fresh()
        if name in ds.tags.list():
            raise Skip
        ds.tags.create(name, (self.line, ds.version) if self.line else ds.version)
        self.kept.append(
            Kept(lance.dataset(str(self.root)).checkout_version(name), self.line, self.generation)
        )
        return name

    def overwrite(self) -> str:
        rows = self.rows(self.random.choice([30, 60]))
        lance.write_dataset(
            table(rows, self.dtype), self.fresh(), mode="overwrite", max_rows_per_file=30, data_storage_version=self.storage
        )  # fmt: skip
        self.lines[self.line] = rows
        return f"{len(rows)} rows"

    def restore(self) -> str:
        there = {v["version"] for v in self.fresh().versions()}
        known = [v for line, v in self.snapshots if line == self.line and v in there]
        version = self.random.choice(known)
        self.fresh().checkout_version((self.line, version) if self.line else version).restore()
        self.lines[self.line] = dict(self.snapshots[(self.line, version)])
        return f"version {version}"

    def recreate(self) -> str:
        versions = self.fresh(None).version
        # The build beside may be removing what it has begun at the same moment.
        shutil.rmtree(self.root, onerror=_unless_gone)
        self.generation += 1
        self.write()
        # As many versions, so that numbers agree.
        if self.random.random() < 0.7:
            while self.fresh().version < versions:
                self.append()
        return f"at version {self.fresh().version}"

    def cleanup(self) -> str:
        unverified = self.random.random() < 0.6
        self.fresh().cleanup_old_versions(
            datetime.timedelta(0), delete_unverified=unverified, error_if_tagged_old_versions=False
        )
        return "of all files" if unverified else "of versions"

    def given(self) -> Any:
        if self.model is None:
            centroids = self.numpy.standard_normal((self.partitions, DIM)).astype(self.dtype)
            codebook = self.numpy.standard_normal((2, 2**self.bits, DIM // 2)).astype(self.dtype)
            self.model = la.IvfPqModel(centroids, codebook, self.metric)
        return self.model
