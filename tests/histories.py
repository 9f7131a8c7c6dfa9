"""Random histories of a dataset and of the indexes that are built meanwhile, against a plain list of its live rows.

A history is a small dataset and some random steps. After each step every live row with a usable vector must be found by an
exhaustive search exactly once, or the step ended in a typed error and changed nothing. `scripts/histories N` runs many;
``--seed S`` runs one again and prints its steps.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")
os.environ.setdefault("LANCE_LOG", "error")

from history_builds import OTHERS, OURS, History
from history_model import HistoryError


def one(seed: int, base: str, off: frozenset[str] = frozenset(), stock: bool = False) -> dict[str, Any]:
    """Run one history in a folder of its own. What failed comes back as text."""
    folder = Path(tempfile.mkdtemp(prefix=f"history-{seed}-", dir=base))
    history = History(seed, folder, off, stock)
    started, failure, trace = time.perf_counter(), None, ""
    # A history that hangs ends its process, and says where.
    there = Path.cwd()
    faulthandler.dump_traceback_later(120, exit=True)
    try:
        history.run()
    except HistoryError as error:
        failure = str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Lance's is none of `Exception`
        failure, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.chdir(there)
        tempfile.tempdir = None
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.perf_counter() - started
    return {
        "seed": seed, "failure": failure, "trace": trace, "log": history.log, "count": dict(history.count), "seconds": seconds,
    }  # fmt: skip


def base_folder() -> str:
    """Memory where there is some: a history writes hundreds of tiny files."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and os.access(memory, os.W_OK) else tempfile.gettempdir()


def many(
    count: int,
    seed: int,
    jobs: int,
    off: frozenset[str] = frozenset(),
    stock: bool = False,
    each: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Histories of the seeds ``seed``, ``seed + 1`` and so on, in processes of their own (Lance cannot be forked)."""
    results = []
    with tempfile.TemporaryDirectory(prefix="histories-", dir=base_folder()) as base:
        if jobs == 1:
            for n in range(count):
                results.append(one(seed + n, base, off, stock))
                if each:
                    each(results[-1])
            return results
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            waiting = [pool.submit(one, seed + n, base, off, stock) for n in range(count)]
            for future in as_completed(waiting):
                results.append(future.result())
                if each:
                    each(results[-1])
    return sorted(results, key=lambda r: int(r["seed"]))


def describe(result: dict[str, Any]) -> str:
    steps = "\n".join(f"  {n}. {said}" for n, said in enumerate(result["log"]))
    trace = "".join(result["trace"].splitlines(keepends=True)[-7:])
    return f"seed {result['seed']}: {result['failure'] or 'right'}\n{steps}\n{trace}"


def totals(results: list[dict[str, Any]]) -> Counter[str]:
    count: Counter[str] = Counter()
    for result in results:
        count.update(result["count"])
    return count


def _kind(result: dict[str, Any]) -> str:
    """What failed, without names and numbers."""
    step = result["log"][-1].split()[0] if result["log"] else "start"
    text = re.sub(r"v_[ab]|[0-9a-f]{8}-[0-9a-f-]{27}|/\S+", "*", str(result["failure"]))
    return f"{step}: {re.sub(r'{.*?}|[0-9]+(, [0-9]+)*', '#', text)[:130]}"


def summary(results: list[dict[str, Any]]) -> str:
    count = totals(results)
    failed = [r for r in results if r["failure"]]
    lines = [
        f"{len(results)} histories, {sum(count[k] for k in (*OTHERS, *OURS))} steps, {len(failed)} failed"
    ]
    lines.append("  steps: " + ", ".join(f"{k} {count[k]}" for k in (*OTHERS, *OURS) if count[k]))
    lines += [f"  {k:<44} {count[k]:>7}" for k in sorted(count) if ": " in k]
    lines += [f"  {k} {count[k]:.1f}" for k in count if k.startswith("seconds")]
    alike: dict[str, list[int]] = {}
    for result in failed:
        alike.setdefault(_kind(result), []).append(result["seed"])
    for kind, seeds in sorted(alike.items(), key=lambda pair: -len(pair[1])):
        lines.append(f"  {len(seeds)} failed: {kind}: seeds {seeds[:5]}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/histories", description=__doc__.split("\n")[0])
    parser.add_argument("count", type=int, nargs="?", help="histories; default 500, or 1 with --seed")
    parser.add_argument("--seed", type=int, help="of the first history; default by the clock, printed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--off", default="", help="kinds of steps to leave out, separated by commas")
    parser.add_argument(
        "--stock", action="store_true", help="build with stock pylance, to tell its faults from ours"
    )
    parser.add_argument("--failures", type=int, default=5, help="how many failed histories to print")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON at the end")
    args = parser.parse_args()
    count = args.count or (1 if args.seed is not None else 500)
    seed = int(time.time()) * 1000 if args.seed is None else args.seed
    off = frozenset(args.off.split(",")) - {""}
    if off - {*OTHERS, *OURS}:
        parser.error(f"--off: {sorted(off - {*OTHERS, *OURS})} are no steps; there are {[*OTHERS, *OURS]}")
    print(f"{count} histories from seed {seed}", file=sys.stderr)
    started, done, failed = time.time(), 0, 0

    def each(result: dict[str, Any]) -> None:
        nonlocal done, failed
        done += 1
        if result["failure"]:
            failed += 1
            if failed <= args.failures:
                print(describe(result), file=sys.stderr)
        if done % 500 == 0:
            print(f"  {done} of {count}, {failed} failed, {time.time() - started:.0f} s", file=sys.stderr)

    results = many(count, seed, min(args.jobs, count), off, args.stock, each)
    if count == 1:
        print(describe(results[0]))
    print(f"{summary(results)}\n  {time.time() - started:.1f} s")
    if args.json:
        print(json.dumps(totals(results)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
