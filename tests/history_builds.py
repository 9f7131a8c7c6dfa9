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
from history_model import (
    Rows,
    State,
    check,
    expect,
    index_folders,
    lines_of,
    open_line,
    referenced,
    table,
    usable,
)
from history_others import NAMES, Dataset, Kept, Made, Skip

# What others do to the dataset, and how often; then what is ours.
OTHERS = {
    "append": 6, "delete": 5, "update_id": 3, "update_vector": 3, "rewrite_vector": 3, "rewrite_extra": 2, "columns": 1,
    "compact": 4, "optimize": 3, "stock_index": 1, "branch": 3, "switch": 4, "tag": 2, "overwrite": 1, "restore": 2, "recreate": 2,
    "cleanup": 3,
}  # fmt: skip
OURS = {
    "create": 10, "stale": 6, "artifact": 6, "shards": 3, "finalize": 6, "sourceless": 6, "two": 3, "meanwhile": 8, "chdir": 2,
}  # fmt: skip
# What can happen in the middle of a build, and where. "committing" is the moment between the last look at the dataset and
# Lance's own commit: what is done then cannot be prevented, only seen afterwards and undone.
GENTLE = (
    "append", "delete", "update_id", "update_vector", "rewrite_vector", "rewrite_extra", "compact", "stock_index", "tag", "branch",
)  # fmt: skip
ROUGH = ("overwrite", "restore", "recreate", "cleanup", "optimize")
POINTS = {"encoded": GENTLE + ROUGH, "built": GENTLE + ROUGH, "committing": (*GENTLE, "cleanup", "recreate")}


class _Points:
    """Calls actions in the middle of a build. Everything it hooks into is public."""

    def __init__(self, actions: dict[str, list[Callable[[], None]]]) -> None:
        self.actions = actions
        self.acting = False
        self.error: BaseException | None = None

    def _act(self, point: str) -> None:
        if self.acting or not self.actions.get(point):
            return
        self.acting = True
        # All that is to happen at the commit happens at its first try: a later one may be the commit that takes it back.
        now = len(self.actions[point]) if point == "committing" else 1
        try:
            for _ in range(now):
                self.actions[point].pop(0)()
        except BaseException as error:  # raised at the end: a build survives what a callback raises
            self.error = error
        finally:
            self.acting = False

    def progress(self, step: Any) -> None:
        if step.event == "complete":
            self._act({"shuffle": "encoded", "merge_partitions": "built"}.get(step.stage, ""))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The commit goes through the user's pylance handle, by one of these."""
        kept = {n: vars(lance.LanceDataset)[n] for n in ("commit_existing_index_segments", "commit")}

        def hook(original: Any) -> Any:
            def commit(*arguments: Any, **options: Any) -> Any:
                self._act("committing")
                return original(*arguments, **options)

            return commit

        for name, original in kept.items():
            static = isinstance(original, staticmethod)
            hooked = hook(original.__func__ if static else original)
            setattr(lance.LanceDataset, name, staticmethod(hooked) if static else hooked)
        try:
            yield
        finally:
            for name, original in kept.items():
                setattr(lance.LanceDataset, name, original)


def segments_of(ds: Any, name: str) -> list[Any]:
    return [s for i in ds.describe_indices() if i.name == name for s in i.segments]


def _usable_row_ids(rows: pa.Table, live: Rows, metric: str) -> np.ndarray:
    take = [usable(live[i], metric) for i in rows["id"].to_pylist()]
    ids: np.ndarray = rows["_rowid"].combine_chunks().to_numpy()[np.array(take, dtype=bool)]
    return ids


class History(Dataset):
    """One history: `run` makes the dataset and takes the steps."""

    def build_options(self, fresh: bool) -> dict[str, Any]:
        name, ds = self.random.choice(NAMES), self.fresh()
        exists = any(i.name == name for i in ds.describe_indices())
        options = {"name": name, "replace": exists if self.random.random() < 0.9 else not exists}
        if self.random.random() < 0.1:
            options["index_type"] = "IVF_HNSW_PQ"
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
        options = {k: v for k, v in options.items() if k not in ("fragment_ids", "index_type")}
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
        self.late = False
        outcome = "committed"
        try:
            act()
        except la.LanceArtifactError as error:
            outcome = type(error).__name__
            expect(outcome != "LanceArtifactError" or self.stock, f"a defect: {error}")
            text = " ".join(str(error).split())[:400]
            expect(not must, f"{what} was refused though nothing else happened: {outcome}: {text}")
            now, then = State.of(self.root), self.middle or before
            if self.late:
                # What was committed and undone again has a version, and nothing else.
                now, then = now.without_versions(), then.without_versions()
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
        return bool(self.live) and bool(there) == options["replace"] and not options.get("fragment_ids")

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
            self.keep(Made(uris[0], self.line, self.generation, int(ds.version), some is None))
        return said

    def keep(self, made: Made) -> None:
        self.made.append(made)
        if self.random.random() < 0.4 and "finalize" not in self.off:
            self.queue.append("finalize")

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
        self.keep(Made("", self.line, self.generation, int(ds.version), True, shards=uris))
        return said

    def sourceless(self) -> str:
        """An encoder of somebody else that may say nothing of where its rows come from, and may have left out some."""
        ds = self.fresh()
        fragments = ds.get_fragments()
        if not fragments:
            raise Skip
        chosen = fragments if self.random.random() < 0.6 else self.random.sample(fragments, 1)
        ids = [f.fragment_id for f in chosen]
        rows = ds.scanner(columns=["id"], with_row_id=True, fragments=chosen).to_table()
        row_ids, seen = _usable_row_ids(rows, self.live, self.metric), len(rows)
        fault = self.random.choice(["", "", "", "none", "some", "uncounted", "others"])
        if fault == "none":
            row_ids = row_ids[:0]
        elif fault == "some":
            row_ids = row_ids[: len(row_ids) // 3]
        elif fault == "others":
            # Usable rows of all fragments; an encoder that says of a usable row that it is none is believed.
            everything = _usable_row_ids(
                ds.to_table(columns=["id"], with_row_id=True), self.live, self.metric
            )
            row_ids = self.numpy.choice(everything, len(row_ids), replace=False)
        counted = (
            {}
            if fault == "uncounted"
            else {"rows_seen": seen, "rows_dropped": {"unusable": seen - len(row_ids)}}
        )
        if fault in ("none", "some"):
            counted = {}
        uri, model = self.target(), self.given()
        source = la.describe_source(ds, "vector", ids) if self.random.random() < 0.3 else None

        def act() -> None:
            builder = la.PartitionArtifactBuilder(uri, model, source=source)
            parts = self.numpy.integers(0, self.partitions, len(row_ids), dtype=np.uint32)
            codes = self.numpy.integers(0, 256, len(row_ids) * model.pq_code_width, dtype=np.uint8)
            wide = pa.FixedSizeListArray.from_arrays(pa.array(codes), model.pq_code_width)
            columns = [pa.array(row_ids), pa.array(parts), wide]
            if len(row_ids):
                builder.append_batch(pa.table(columns, ["_rowid", "__ivf_part_id", "__pq_code"]))
            builder.finish(**counted)

        said = self.ours(f"sourceless {fault or 'right'} of {ids}{', with a source' if source else ''}", act)
        say = {"fragment_ids": ids} if self.random.random() < 0.7 else {}
        right = not fault and len(ids) == len(fragments) and (bool(say) or source is not None)
        self.keep(Made(uri, self.line, self.generation, int(ds.version), right, say))
        return said

    def finalize(self) -> str:
        if not self.made or self.stock:
            raise Skip
        made = self.random.choice(self.made[-3:])
        if made.generation == self.generation:
            self.line = made.line
        ds, fresh = self.fresh(), True
        if self.kept and self.random.random() < 0.2:
            ds, fresh = self.old().dataset, False
        options = {**self.build_options(False), **made.options}
        # An artifact of everything, and nothing happened since.
        same = (made.generation, made.line, made.version) == (
            self.generation,
            self.line,
            self.fresh().version,
        )
        must = made.right and same and fresh and self.plain({**options, "fragment_ids": None})
        about = f"{made.shards or made.uri} of {made.line or 'main'} version {made.version} with {options}"
        return self.ours(
            f"finalize {about}", lambda: la.finalize(ds, "vector", made.shards or made.uri, **options), must
        )

    def two(self) -> str:
        handles = [self.fresh(), self.fresh()] if self.random.random() < 0.6 else [self.fresh()] * 2
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

        return self.ours(f"two at once {options}{' by one handle' if handles[0] is handles[1] else ''}", act)

    def meanwhile(self) -> str:
        """A build, and something else in the middle of it; or two things, or several times at the commit."""
        ds, options = self.fresh(), self.build_options(True)
        kept = [k for k in self.kept if (k.generation, k.line) == (self.generation, self.line)]
        if kept and self.random.random() < 0.2:
            ds = self.random.choice(kept).dataset
        actions: dict[str, list[Callable[[], None]]] = {}
        done: list[str] = []
        for point in self.random.choices(list(POINTS), k=self.random.choice([1, 1, 1, 2, 3])):
            kinds = [k for k in POINTS[point] if k not in self.off]
            if point == "committing" and self.line is not None:
                # A branch that is gone with its dataset has no version to go back to; the dataset is not touched.
                kinds = [k for k in kinds if k != "recreate"]
            kind = self.random.choice(kinds)

            def action(kind: str = kind, point: str = point) -> None:
                line = self.line
                with suppress(Skip):
                    done.append(f"{kind} {getattr(self, kind)()}, when {point}")
                    self.remember()
                self.line = line if line in self.lines else None
                self.middle = State.of(self.root)
                self.late |= point == "committing"

            actions.setdefault(point, []).append(action)
        points = _Points(actions)

        def act() -> None:
            try:
                with points.hooked():
                    self.create_index(ds, options, **({} if self.stock else {"progress": points.progress}))
            finally:
                if points.error is not None:
                    raise points.error

        said = self.ours(f"meanwhile {options} handle of version {ds.version}", act)
        return f"{said}; meanwhile {'; '.join(done) or 'nothing'}"

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
            self.step(
                self.queue.pop() if self.queue else self.random.choices(list(kinds), list(kinds.values()))[0]
            )
        for line in lines_of(self.root):
            self.line = line
            self.check()
