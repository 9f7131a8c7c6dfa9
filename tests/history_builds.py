"""What a history does through lance_artifact, and the random sequence of both."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lance
import numpy as np
import pyarrow as pa

import lance_artifact as la
from history_model import State, check, expect, index_folders, lines_of, open_line, referenced, table, usable
from history_others import NAMES, Dataset, Kept, Made, Skip

# What others do to the dataset, and how often; then what is ours.
OTHERS = {
    "append": 6, "delete": 5, "update_id": 3, "update_vector": 3, "rewrite_vector": 3, "rewrite_extra": 2, "columns": 1,
    "compact": 4, "optimize": 3, "stock_index": 1, "branch": 2, "switch": 2, "tag": 2, "overwrite": 1, "restore": 2, "recreate": 2,
    "cleanup": 3,
}  # fmt: skip
OURS = {
    "create": 10, "stale": 6, "artifact": 6, "shards": 3, "finalize": 6, "sourceless": 6, "two": 3, "meanwhile": 8, "chdir": 2,
}  # fmt: skip
# What can happen in the middle of a build, and where. "committing" is the moment between the last look at the dataset and
# Lance's own commit, which nobody can guard against a folder that is removed.
GENTLE = (
    "append",
    "delete",
    "update_id",
    "update_vector",
    "rewrite_vector",
    "rewrite_extra",
    "compact",
    "stock_index",
)
ROUGH = ("overwrite", "restore", "recreate", "cleanup", "branch", "tag", "optimize")
POINTS = {"encoded": GENTLE + ROUGH, "built": GENTLE + ROUGH, "committing": GENTLE}


class _Points:
    """Calls an action once, in the middle of a build. Everything it hooks into is public."""

    def __init__(self, point: str, action: Callable[[], None]) -> None:
        self.point, self.action = point, action
        self.done = False
        self.error: BaseException | None = None

    def _act(self, point: str) -> None:
        if point == self.point and not self.done:
            self.done = True
            try:
                self.action()
            except BaseException as error:  # raised at the end: a build survives what a callback raises
                self.error = error

    def progress(self, step: Any) -> None:
        if step.event == "complete":
            self._act({"encode": "encoded", "merge_partitions": "built"}.get(step.stage, ""))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The commit goes through the user's pylance handle by one of these."""
        kept = {n: getattr(lance.LanceDataset, n) for n in ("commit_existing_index_segments",)}

        def hook(original: Any) -> Any:
            def commit(*arguments: Any, **options: Any) -> Any:
                self._act("committing")
                return original(*arguments, **options)

            return commit

        for name, original in kept.items():
            setattr(lance.LanceDataset, name, hook(original))
        try:
            yield
        finally:
            for name, original in kept.items():
                setattr(lance.LanceDataset, name, original)


def segments_of(ds: Any, name: str) -> list[Any]:
    return [s for i in ds.describe_indices() if i.name == name for s in i.segments]


class History(Dataset):
    """One history: `run` makes the dataset and takes the steps."""

    def build_options(self, fresh: bool) -> dict[str, Any]:
        name, ds = self.random.choice(NAMES), self.fresh()
        exists = any(i.name == name for i in ds.describe_indices())
        options = {"name": name, "replace": exists if self.random.random() < 0.9 else not exists}
        self.trained = self.random.random() < 0.2
        fragments = [f.fragment_id for f in ds.get_fragments()]
        if len(fragments) > 1 and self.random.random() < 0.2 and fresh:
            options["fragment_ids"] = self.random.sample(
                fragments, self.random.randint(1, len(fragments) - 1)
            )
        return options

    def create_index(self, ds: Any, options: dict[str, Any], **more: Any) -> None:
        model = self.given()
        if self.stock:
            self.stock_create(ds, options)
        elif self.trained:
            la.create_index(
                ds, "vector", metric=self.metric, num_partitions=self.partitions, num_sub_vectors=2, num_bits=4, sample_rate=2,
                max_iters=2, backend="cpu", **options, **more,
            )  # fmt: skip
        else:
            la.create_index(
                ds, "vector", metric=self.metric, ivf_centroids=model.ivf_centroids, pq_codebook=model.pq_codebook,
                num_sub_vectors=2, num_bits=self.bits, backend="cpu", **options, **more,
            )  # fmt: skip

    def stock_create(self, ds: Any, options: dict[str, Any]) -> None:
        """The same by stock pylance, to tell its own faults from ours."""
        options = {k: v for k, v in options.items() if k != "fragment_ids"}
        model = self.given()
        try:
            ds.create_index(
                "vector", "IVF_PQ", metric=self.metric, num_partitions=self.partitions, num_sub_vectors=2, num_bits=self.bits,
                ivf_centroids=model.ivf_centroids, pq_codebook=model.pq_codebook, **options,
            )  # fmt: skip
        except (OSError, RuntimeError, ValueError) as error:
            raise la.LanceArtifactError(str(error)) from error

    def ours(self, what: str, act: Callable[[], None], must: bool = False, since: State | None = None) -> str:
        """Run a build. It commits, or raises an error of ours and changes nothing."""
        before = since or State.of(self.root)
        generation, folders = self.generation, index_folders(self.root)
        self.middle: State | None = None
        outcome = "committed"
        try:
            act()
        except la.LanceArtifactError as error:
            outcome = type(error).__name__
            expect(outcome != "LanceArtifactError" or self.stock, f"a defect: {error}")
            text = " ".join(str(error).split())[:160]
            expect(not must, f"{what} was refused though nothing else happened: {outcome}: {text}")
            now, then = State.of(self.root), self.middle or before
            expect(now == then, f"{what} failed with {outcome} ({text}) and changed {then} to {now}")
        self.count[f"{what.split()[0]}: {outcome}"] += 1
        start = {} if self.generation != generation else {line: v for line, (v, _) in before.lines.items()}
        new = index_folders(self.root) - folders
        left = new - referenced(self.root, start) if new else set()
        expect(not left or self.stock, f"{what} ({outcome}) left segments {left} that no version names")
        temporary = list((self.folder / "tmp").iterdir())
        expect(not temporary, f"{what} ({outcome}) left {temporary}")
        return f"{what}: {outcome}"

    def plain(self, options: dict[str, Any]) -> bool:
        """Whether a build of a fresh handle has nothing that could refuse it."""
        there = segments_of(self.fresh(), options["name"])
        return bool(self.live) and bool(there) == options["replace"] and "fragment_ids" not in options

    def create(self) -> str:
        ds, options = self.fresh(), self.build_options(True)
        must = self.plain(options) and not self.trained
        return self.ours(f"create {options}", lambda: self.create_index(ds, options), must)

    def old(self) -> Kept:
        if not self.kept:
            raise Skip
        kept = self.random.choice(self.kept)
        if kept.generation == self.generation:
            self.line = kept.line
        return kept

    def stale(self) -> str:
        kept = self.old()
        options = self.build_options(False)
        about = f"handle of {kept.line or 'main'} version {kept.dataset.version}" + (
            " of a dataset that is gone" if kept.generation != self.generation else ""
        )
        return self.ours(f"stale {options} {about}", lambda: self.create_index(kept.dataset, options))

    def target(self) -> str:
        self.name += 1
        return str(self.folder / "artifacts" / str(self.name))

    def _encode(self, ds: Any, fragments: list[int] | None) -> str:
        uri = self.target()
        la.build_artifact(ds, "vector", self.given(), uri, backend="cpu", fragment_ids=fragments)
        return uri

    def artifact(self) -> str:
        ds, uris = self.fresh(), []
        fragments = [f.fragment_id for f in ds.get_fragments()]
        some = self.random.sample(fragments, 1) if fragments and self.random.random() < 0.3 else None

        def act() -> None:
            uris.append(self._encode(ds, some))

        said = self.ours(f"artifact of {some or 'all'}", act, bool(self.live))
        if uris:
            self.made.append(Made(uris[0], self.line, self.generation, int(ds.version), {}))
        return said

    def shards(self) -> str:
        ds, uris = self.fresh(), []
        fragments = [f.fragment_id for f in ds.get_fragments()]
        if len(fragments) < 2:
            raise Skip
        self.random.shuffle(fragments)
        cut = self.random.randint(1, len(fragments) - 1)

        def act() -> None:
            uris.extend(self._encode(ds, part) for part in (fragments[:cut], fragments[cut:]))

        said = self.ours("shards", act, True)
        self.made.append(Made("", self.line, self.generation, int(ds.version), {}, uris))
        return said

    def sourceless(self) -> str:
        """An encoder of somebody else that says nothing of where its rows come from, and may have left out some."""
        ds = self.fresh()
        fragments = ds.get_fragments()
        if not fragments:
            raise Skip
        chosen = fragments if self.random.random() < 0.6 else self.random.sample(fragments, 1)
        ids = [f.fragment_id for f in chosen]
        rows = ds.scanner(columns=["id"], with_row_id=True, fragments=chosen).to_table()
        take = [usable(self.live[i], self.metric) for i in rows["id"].to_pylist()]
        row_ids = rows["_rowid"].combine_chunks().to_numpy()[np.array(take, dtype=bool)]
        seen = len(take)
        fault = self.random.choice(["", "", "", "none", "some", "uncounted", "others"])
        if fault == "none":
            row_ids = row_ids[:0]
        elif fault == "some":
            row_ids = row_ids[: len(row_ids) // 3]
        elif fault == "others":
            everything = ds.to_table(columns=[], with_row_id=True)["_rowid"].combine_chunks().to_numpy()
            row_ids = self.numpy.choice(everything, len(row_ids), replace=False)
        counted = (
            {}
            if fault == "uncounted"
            else {"rows_seen": seen, "rows_dropped": {"unusable": seen - len(row_ids)}}
        )
        if fault in ("none", "some"):
            counted = {}
        uri, model = self.target(), self.given()

        def act() -> None:
            builder = la.PartitionArtifactBuilder(uri, model)
            parts = self.numpy.integers(0, self.partitions, len(row_ids), dtype=np.uint32)
            codes = self.numpy.integers(0, 256, len(row_ids) * model.pq_code_width, dtype=np.uint8)
            wide = pa.FixedSizeListArray.from_arrays(pa.array(codes), model.pq_code_width)
            columns = [pa.array(row_ids), pa.array(parts), wide]
            if len(row_ids):
                builder.append_batch(pa.table(columns, ["_rowid", "__ivf_part_id", "__pq_code"]))
            builder.finish(**counted)

        said = self.ours(f"sourceless {fault or 'right'} of {ids}", act)
        say = {"fragment_ids": ids} if self.random.random() < 0.7 else {}
        self.made.append(Made(uri, self.line, self.generation, int(ds.version), say))
        return said

    def finalize(self) -> str:
        if not self.made or self.stock:
            raise Skip
        made = self.random.choice(self.made[-3:])
        if made.generation == self.generation:
            self.line = made.line
        ds = self.fresh()
        if self.kept and self.random.random() < 0.2:
            ds = self.old().dataset
        options = {**self.build_options(False), **made.options}
        about = f"{made.shards or made.uri} of {made.line or 'main'} version {made.version} with {options}"
        return self.ours(
            f"finalize {about}", lambda: la.finalize(ds, "vector", made.shards or made.uri, **options)
        )

    def two(self) -> str:
        handles = [self.fresh(), self.fresh()]
        options = [{"name": self.random.choice(NAMES), "replace": True} for _ in handles]
        if not self.live:
            raise Skip
        errors: list[BaseException | None] = [None, None]
        self.given()

        def build(n: int) -> None:
            try:
                la.create_index(
                    handles[n], "vector", metric=self.metric, ivf_centroids=self.model.ivf_centroids,
                    pq_codebook=self.model.pq_codebook, num_sub_vectors=2, num_bits=self.bits, backend="cpu", **options[n],
                )  # fmt: skip
            except BaseException as error:
                errors[n] = error

        def act() -> None:
            threads = [threading.Thread(target=build, args=(n,)) for n in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for error in errors:
                if error is not None and not isinstance(error, la.LanceArtifactError):
                    raise error
            expect(None in errors, f"neither of two builds was committed: {errors}")

        return self.ours(f"two at once {options}", act)

    def meanwhile(self) -> str:
        point = self.random.choice(list(POINTS))
        kinds = [k for k in POINTS[point] if k not in self.off]
        kind = self.random.choice(kinds)
        ds, options = self.fresh(), self.build_options(True)
        done = []

        def action() -> None:
            with suppress(Skip):
                done.append(getattr(self, kind)())
                self.remember()
            self.middle = State.of(self.root)

        points = _Points(point, action)

        def act() -> None:
            try:
                with points.hooked():
                    self.create_index(ds, options, **({} if self.stock else {"progress": points.progress}))
            finally:
                if points.error is not None:
                    raise points.error

        return self.ours(f"meanwhile {kind} when {point} {options}", act) + f" ({kind}: {done})"

    def chdir(self) -> str:
        """A handle of a relative path, and another dataset of that name in the folder that is current later."""
        other = self.folder / "there"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(self.root.parent, other)
        if self.random.random() < 0.5:
            lance.write_dataset(table(self.rows(30), self.dtype), str(other / "d.lance"), mode="overwrite")
        files = sorted(p for p in other.rglob("*") if p.is_file())
        os.chdir(self.root.parent)
        try:
            ds = open_line("d.lance", self.line)
            os.chdir(other)
            options = self.build_options(True)
            said = self.ours(f"chdir {options}", lambda: self.create_index(ds, options))
        finally:
            os.chdir(self.folder)
        new = {p for p in other.rglob("*") if p.is_file()} ^ set(files)
        expect(not new, f"{said}: files of another dataset changed: {sorted(map(str, new))[:4]}")
        return said

    # The history

    def check(self) -> None:
        check(self.root, self.line, self.live, self.metric, self.dtype, self.query)

    def step(self, kind: str) -> None:
        started = time.perf_counter()
        before = None if kind in OURS else State.of(self.root).lines
        try:
            said = getattr(self, kind)()
        except Skip:
            return
        except BaseException:
            self.log.append(f"{kind} ...")
            raise
        self.log.append(f"{kind} {said}" if kind in OTHERS else said)
        self.count[kind] += 1
        self.remember()
        middle = time.perf_counter()
        self.check()
        if before is not None and kind not in ("recreate",):
            now = State.of(self.root).lines
            moved = [n for n in before if n != self.line and n in now and now[n] != before[n]]
            expect(not moved, f"{kind} on {self.line} changed {moved}")
        self.count["seconds in steps"] += middle - started  # type: ignore[assignment]
        self.count["seconds in checks"] += time.perf_counter() - middle  # type: ignore[assignment]
        if self.random.random() < 0.4:
            self.kept.append(Kept(self.fresh(), self.line, self.generation))
            self.kept = self.kept[-5:]

    def run(self) -> None:
        for name in ("tmp", "artifacts"):
            (self.folder / name).mkdir(parents=True)
        tempfile.tempdir = str(self.folder / "tmp")
        os.chdir(self.folder)
        self.write()
        self.log.append(
            f"{len(self.live)} rows in {len(self.fresh().get_fragments())} fragments, {self.dtype}, {self.metric}, "
            f"{'stable' if self.stable else 'address'} row ids, storage {self.storage}"
        )
        self.kept.append(Kept(self.fresh(), None, 0))
        kinds = {k: w for k, w in {**OTHERS, **OURS}.items() if k not in self.off}
        for _ in range(self.random.randint(4, 12)):
            self.step(self.random.choices(list(kinds), list(kinds.values()))[0])
        for line in lines_of(self.root):
            self.line = line
            self.check()
