"""The processes of a soak: each does one kind of thing to the table, again and again, and logs what came of it.

``python tests/soak_roles.py ROLE CONFIG`` is one of them; `soak.py` starts all.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")
os.environ.setdefault("LANCE_LOG", "error")

import lance
import numpy as np
from lance.dataset import Session

import lance_artifact as la
from soak_table import DIM, NAME, UPSERTED, Kind, SoakError, check_version, opened, table

# Each of a session's two caches, so small that they are full before the warm-up ends: what grows after that is a leak. With 16 MiB they
# fill up for an hour.
CACHE_BYTES = 1 << 20
# What Lance's own errors of a commit that came second say.
CONFLICTS = ("conflict", "incompatible transaction", "preempted", "too many concurrent", "contention")


class Role:
    """One process: `step` does one thing and says what.

    Attributes
    ----------
    rest : pair of float
        Seconds between two steps, at least and at most.
    """

    rest = (0.5, 1.5)

    def __init__(self, config: dict[str, Any]) -> None:
        self.uri, self.options = str(config["uri"]), config["options"]
        self.work, self.age, self.most = str(config["work"]), float(config["age"]), int(config["most"])
        self.kind = Kind.of(int(config["seed"]))
        self.random = random.Random(f"{config['seed']} {type(self).__name__}")
        self.numpy = np.random.default_rng(self.random.getrandbits(64))
        self.session = Session(CACHE_BYTES, CACHE_BYTES)
        self.kept: Any = None
        self.steps = 0

    def open(self) -> Any:
        """The latest version, by a handle that was there before or by a new one."""
        if self.kept is None or self.random.random() < 0.3:
            self.kept = opened(self.uri, self.options, self.session)
        else:
            self.kept.checkout_latest()
        return self.kept

    def ids(self, ds: Any) -> np.ndarray:
        found: np.ndarray = ds.to_table(columns=["id"])["id"].to_numpy()
        return found

    def some(self, ids: np.ndarray, count: int) -> list[int]:
        return sorted(int(i) for i in self.numpy.choice(ids, min(count, len(ids)), replace=False))

    def step(self) -> dict[str, Any]:
        """Do one thing. What was done has a key ``op``, and ``version`` where it committed."""
        raise NotImplementedError

    def is_conflict(self, error: BaseException) -> bool:
        """Whether the step came second to another process, which may happen to any."""
        if isinstance(error, la.LanceArtifactError):
            return isinstance(error, la.CommitConflictError)
        return isinstance(error, (OSError, RuntimeError, ValueError)) and any(
            word in str(error).lower() for word in CONFLICTS
        )


class Appending(Role):
    rest = (0.2, 1.0)
    first: int | None = None

    def step(self) -> dict[str, Any]:
        ds = self.open()
        if self.first is None:
            self.first = int(self.ids(ds).max()) + 1
        if ds.count_rows() > self.most:
            return {"op": "append", "said": "there are rows enough"}
        ids = np.arange(self.first, self.first + self.random.choice([20, 200, 800]))
        # Not again, whatever becomes of it.
        self.first = int(ids[-1]) + 1
        rows = table(self.kind.seed, ids, np.zeros(len(ids)))
        made = lance.write_dataset(
            rows, ds, mode="append", max_rows_per_file=self.random.choice([150, 1000]), data_storage_version=self.kind.storage
        )  # fmt: skip
        return {"op": "append", "range": [int(ids[0]), self.first], "version": int(made.version)}


class Deleting(Role):
    rest = (0.2, 1.5)

    def step(self) -> dict[str, Any]:
        ds = self.open()
        ids = self.ids(ds)
        share = 0.15 if len(ids) > 0.8 * self.most else 0.02
        count = max(1, int(self.random.random() * share * len(ids)))
        way = self.random.choice(["some", "range", "fragment"])
        if way == "fragment":
            small = [f for f in ds.get_fragments() if f.count_rows() <= max(400, count)]
            chosen = self.random.choice(small).to_table(columns=["id"])["id"].to_pylist() if small else []
            way = "some" if not chosen else way
        if way == "some":
            chosen = self.some(ids, count)
        if way == "range":
            appended = np.sort(ids[ids < UPSERTED])
            at = self.random.randrange(len(appended))
            first, end = int(appended[at]), int(appended[min(at + count, len(appended) - 1)]) + 1
            done = ds.delete(f"id >= {first} and id < {end}")
            said: dict[str, Any] = {"range": [first, end]}
        else:
            done = ds.delete(f"id in ({', '.join(map(str, chosen))})")
            said = {"ids": chosen}
        return {"op": "delete", **said, "rows": done["num_deleted_rows"], "version": int(ds.version)}


class Updating(Role):
    rest = (0.2, 1.5)
    generation = 0
    first = UPSERTED

    def step(self) -> dict[str, Any]:
        ds = self.open()
        chosen = self.some(self.ids(ds), self.random.choice([1, 20, 150]))
        way = self.random.choice(["upsert", "update", "rewrite", "touch"])
        if way == "touch":
            done = ds.update({"extra": "id"}, where=f"id in ({', '.join(map(str, chosen))})")
            return {"op": way, "ids": chosen, "rows": done["num_rows_updated"], "version": int(ds.version)}
        self.generation += 1
        if way == "upsert":
            chosen = [*chosen, *range(self.first, self.first + 10)]
            self.first += 10
        rows = table(self.kind.seed, chosen, np.full(len(chosen), self.generation))
        merge = ds.merge_insert("id").when_matched_update_all()
        if way == "upsert":
            merge = merge.when_not_matched_insert_all()
        if way == "rewrite":
            rows = rows.select(["id", "generation", "vector"])
        done = merge.execute(rows)
        changed = done["num_updated_rows"] + done["num_inserted_rows"]
        return {"op": way, "ids": chosen, "generation": self.generation, "rows": changed, "version": int(ds.version)}  # fmt: skip


class Keeping(Role):
    """Compacts, and cleans up old versions."""

    rest = (1.0, 4.0)

    def step(self) -> dict[str, Any]:
        ds = self.open()
        if self.random.random() < 0.6:
            target = self.random.choice([1500, 100_000])
            done = ds.optimize.compact_files(target_rows_per_fragment=target)
            return {"op": "compact", "said": f"{done.fragments_removed} fragments to {done.fragments_added}"}
        done = ds.cleanup_old_versions(datetime.timedelta(seconds=self.age))
        return {"op": "clean", "said": f"{done.old_versions} versions"}


class Building(Role):
    rest = (0.3, 2.0)

    def step(self) -> dict[str, Any]:
        ds, kind = self.open(), self.kind
        way = self.random.choice(["train", "train", "again", "run", "artifact"])
        options: dict[str, Any] = {"name": NAME, "replace": True, "metric": kind.metric, "num_bits": kind.bits, "backend": "cpu"}  # fmt: skip
        training = {
            "num_partitions": kind.partitions,
            "num_sub_vectors": 4,
            "sample_rate": 32,
            "max_iters": 5,
        }
        if way == "train":
            la.create_index(ds, "vector", **options, **training, seed=self.steps)
        elif way == "again":
            model = la.IvfPqModel.from_index(ds, NAME)
            la.create_index(
                ds, "vector", **options, ivf_centroids=model.ivf_centroids, pq_codebook=model.pq_codebook, num_sub_vectors=4
            )  # fmt: skip
        elif way == "run":
            self.by_run(ds, {**options, **training, "seed": self.steps})
        else:
            model = la.train(
                ds,
                "vector",
                metric=kind.metric,
                num_bits=kind.bits,
                **training,
                seed=self.steps,
                backend="cpu",
            )
            # At one place again and again: what each one replaces is removed.
            artifact = la.build_artifact(ds, "vector", model, f"{self.work}/artifact", backend="cpu", overwrite=True)  # fmt: skip
            la.finalize(ds, "vector", artifact, name=NAME, replace=True)
        return {"op": f"build ({way})", "version": int(ds.version), "content": False}

    def by_run(self, ds: Any, options: dict[str, Any]) -> None:
        run = f"{self.work}/runs/{self.steps}"
        stored = self.options or None
        try:
            la.create_index(ds, "vector", **options, artifact_uri=run, resume=True, num_shards=2)
        finally:
            try:
                la.clean_run(run, ds, everything=True, storage_options=stored)
                left = la.clean_run(run, ds, dry_run=True, storage_options=stored)
                raise SoakError(f"{run}: a run that was removed is there: {left}")
            except la.ArtifactNotFoundError:
                pass


class Extending(Role):
    rest = (0.2, 1.2)

    def step(self) -> dict[str, Any]:
        ds = self.open()
        if self.random.random() < 0.7:
            fit = self.random.random() < 0.2
            done: Any = la.extend_index(ds, NAME, backend="cpu", measure_fit=fit)
            op = "extend"
        else:
            done = la.merge_segments(ds, NAME, num_indices_to_merge=self.random.choice([None, 2]))
            op = "merge"
        if done.segment is None:
            return {"op": op, "said": "nothing to do"}
        return {"op": op, "said": str(done), "version": int(ds.version), "content": False}


class Optimizing(Role):
    """Stock pylance's own upkeep of the index, and our merge beside it."""

    rest = (0.5, 2.0)

    def step(self) -> dict[str, Any]:
        ds = self.open()
        if self.random.random() < 0.3:
            done = la.merge_segments(ds, NAME)
            if done.segment is None:
                return {"op": "merge", "said": "nothing to do"}
            return {"op": "merge", "said": str(done), "version": int(ds.version), "content": False}
        before = int(ds.version)
        merged = self.random.choice([{}, {"num_indices_to_merge": 0}, {"num_indices_to_merge": 2}])
        try:
            ds.optimize.optimize_indices(**merged)
        except OSError as error:
            # Lance's own fault, with stock's indexes too: so few new rows that its shuffle has no file for a partition.
            if "/ivf_" not in str(error):
                raise
            return {"op": "optimize", "said": "which Lance could not"}
        if int(ds.version) == before:
            return {"op": "optimize", "said": "nothing to do"}
        return {"op": "optimize", "said": str(merged), "version": int(ds.version), "content": False}


class Searching(Role):
    rest = (0.0, 0.3)

    def step(self) -> dict[str, Any]:
        ds = self.open()
        query = self.numpy.standard_normal(DIM).astype(np.float32) * 3
        k = self.random.choice([1, 10, 100])
        try:
            seen = check_version(ds, self.kind, query, k)
        except (SoakError, OSError) as error:
            raise type(error)(f"{error}. {self.again(ds, query, k)}") from error
        return {"op": "search", "of": int(ds.version), "found": seen}

    def again(self, ds: Any, query: np.ndarray, k: int) -> str:
        """What the same search finds now: whether the table is wrong, the handle, or that one answer."""
        version, found = int(ds.version), []
        if not self.options:
            # As it is now: the others go on, and clean up.
            shutil.copytree(self.uri, f"{self.work}/found.lance")
        lists = ds.describe_indices()
        handles = {
            "the same handle": ds,
            "a handle opened anew": lance.dataset(
                ds.uri, version=version, storage_options=self.options or None
            ),
        }
        for name, handle in handles.items():
            try:
                check_version(handle, self.kind, query, k)
                found.append(f"{name} gives a right answer now")
            except Exception as error:
                found.append(f"{name}: {error}")
        segments = [
            (s.uuid, sorted(s.fragment_ids), s.dataset_version_at_last_update)
            for i in lists
            for s in i.segments
        ]
        named = {v["version"]: str(v["timestamp"]) for v in ds.versions() if v["version"] > version - 20}
        return (
            f"version {version}: {'; '.join(found)}; query {query.tolist()}; segments {segments}; "
            f"versions {named}"
        )


ROLES: dict[str, type[Role]] = {
    "append": Appending, "delete": Deleting, "update": Updating, "keep": Keeping, "build": Building, "extend": Extending,
    "optimize": Optimizing, "search": Searching,
}  # fmt: skip


def outlived(error: BaseException, seconds: float, age: float) -> bool:
    """Whether a step was so slow that the version that it read was cleaned up: this machine's fault, and nobody's."""
    text = f"{type(error).__name__} {error}".lower()
    return seconds > age / 2 and any(
        word in text for word in ("not found", "notfound", "no such file", "404")
    )


def outcome(role: Role, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do a step, and what came of it: ``committed``, ``looked``, ``nothing``, ``conflict``, ``outlived`` or ``failed``."""
    started = time.monotonic()
    try:
        done = step()
        done["outcome"] = "committed" if "version" in done else "nothing" if "said" in done else "looked"
        if done["op"] in ("compact", "clean"):
            done["outcome"] = "committed"
    except BaseException as error:  # a panic of Lance's is none of `Exception`
        took = time.monotonic() - started
        kind = (
            "conflict"
            if role.is_conflict(error)
            else "outlived"
            if outlived(error, took, role.age)
            else "failed"
        )
        done = {"op": type(role).__name__, "outcome": kind, "error": f"{type(error).__name__}: {error}"}
        if kind == "failed":
            done["trace"] = traceback.format_exc()
    done["seconds"] = round(time.monotonic() - started, 3)
    return done


def work(name: str, config: dict[str, Any]) -> int:
    """Take steps until there is a file that says to stop. Each is logged when it begins and when it has ended."""
    role, stop = ROLES[name](config), Path(config["stop"])
    with Path(config["logs"], f"{name}.jsonl").open("a", encoding="utf-8", buffering=1) as log:
        while not stop.exists():
            role.steps += 1
            head = {"role": name, "step": role.steps}
            log.write(json.dumps({**head, "at": time.time(), "begins": True}) + "\n")
            done = outcome(role, role.step)
            log.write(json.dumps({**head, "at": time.time(), **done}) + "\n")
            if done["outcome"] == "failed":
                return 1
            until = time.monotonic() + role.random.uniform(*role.rest)
            while time.monotonic() < until and not stop.exists():
                time.sleep(0.05)
    return 0


if __name__ == "__main__":
    # Whoever finds that this hangs asks where.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # Ctrl-C is for the parent, which lets all end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(work(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))))
