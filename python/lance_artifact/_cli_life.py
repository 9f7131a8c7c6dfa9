"""The commands of an index's whole life: plan, run, extend, merge."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

Parser = argparse.ArgumentParser
Result = tuple[dict[str, Any], str, int]


def add(
    command: Callable[[str, str], Parser],
    training: Callable[[Parser], None],
    committing: Callable[[Parser], None],
) -> None:
    """Add the parsers."""
    plan = command("plan", "say what a build would do and about how long it takes; with --run, prepare it")
    plan.add_argument("dataset")
    plan.add_argument("column")
    training(plan)
    committing(plan)
    _shared(plan)
    plan.add_argument("--num-shards", type=int, metavar="N")
    plan.add_argument("--fragment", type=int, action="append", metavar="ID", help="only these; repeatable")
    plan.add_argument("--run", metavar="URI", help="make a run of the plan in this folder")

    run = command("run", "steps of a run: each may be repeated, by any number of processes")
    run.add_argument("step", choices=["status", "train", "encode", "finalize", "resume", "clean"])
    run.add_argument("run", metavar="URI")
    _shared(run)
    run.add_argument("--shard", type=int, action="append", metavar="N", help="of encode; repeatable")
    run.add_argument("--memory-limit", type=int, metavar="BYTES", help="of the whole command")
    run.add_argument("--all", action="store_true", help="of clean: the run itself too")
    run.add_argument("--dry-run", action="store_true", help="of clean: only list")

    extend = command("extend", "index what came since an index was built")
    extend.add_argument("dataset")
    extend.add_argument("name")
    _shared(extend)
    extend.add_argument("--memory-limit", type=int, metavar="BYTES", help="of the whole command")

    merge = command("merge", "put the segments of an index together")
    merge.add_argument("dataset")
    merge.add_argument("name")
    merge.add_argument("--num-indices-to-merge", type=int, metavar="N", help="the newest only; default all")
    _shared(merge, backend=False)
    merge.add_argument("--memory-limit", type=int, metavar="BYTES", help="of the whole command")

    evaluate = command("evaluate", "recall, rows scanned and latency of an index over a grid of settings")
    evaluate.add_argument("dataset")
    evaluate.add_argument("name")
    evaluate.add_argument("--k", type=int, default=10)
    evaluate.add_argument("--num-queries", type=int, default=100, metavar="N")
    evaluate.add_argument(
        "--target-recall", type=float, metavar="R", help="name the cheapest setting that reaches it"
    )
    evaluate.add_argument(
        "--plot", metavar="FILE", help="draw recall against rows scanned (needs matplotlib)"
    )
    _shared(evaluate, backend=False)


def _shared(made: Parser, backend: bool = True) -> None:
    if backend:
        made.add_argument("--backend", default="auto")
    made.add_argument(
        "--storage-option", action="append", metavar="KEY=VALUE", help="of dataset and run; repeatable"
    )


def plan(ds: Any, args: argparse.Namespace, options: Any) -> Result:
    import lance_artifact as la

    made = la.plan(
        ds,
        args.column,
        args.index_type,
        args.name,
        args.metric,
        args.replace,
        args.num_partitions,
        args.num_sub_vectors,
        num_bits=args.num_bits,
        sample_rate=args.sample_rate,
        max_iters=args.max_iters,
        seed=args.seed,
        fragment_ids=args.fragment,
        backend=args.backend,
        num_shards=args.num_shards,
    )
    text = str(made)
    result: dict[str, Any] = json.loads(made.to_json())
    if args.run:
        run = la.Run.create(made, args.run, storage_options=options, dataset_storage_options=options)
        text += f"\n\nrun {run.uri}: go on with: lance-artifact run resume {run.uri}"
        result = {"run": run.uri, "plan": result}
    return result, text, 0


def run(args: argparse.Namespace, options: Any, bars: bool) -> Result:
    import lance_artifact as la

    if args.shard is not None and args.step != "encode":
        raise la.InvalidInputError("--shard: is of encode")
    if (args.all or args.dry_run) and args.step != "clean":
        raise la.InvalidInputError("--all and --dry-run: are of clean")
    opened = la.Run.open(args.run, storage_options=options, dataset_storage_options=options)
    work: dict[str, Any] = {"memory_limit": args.memory_limit, "progress": bars}
    if args.step == "clean":
        found = la.clean_run(
            opened.uri,
            everything=args.all,
            dry_run=args.dry_run,
            storage_options=options,
            dataset_storage_options=options,
        )
        said = "would be removed" if args.dry_run else "removed"
        text = "\n".join([*map(str, found), f"{len(found)} {said}"])
        return {said: [dataclasses.asdict(each) for each in found]}, text, 0
    if args.step == "train":
        model = opened.train(backend=args.backend, **work)
        return {"model": model.fingerprint}, f"{model!r}", 0
    if args.step == "encode":
        if not args.shard:
            raise la.InvalidInputError("--shard: which one? See lance-artifact run status")
        artifacts = [opened.encode(shard, backend=args.backend, **work) for shard in args.shard]
        return {"artifacts": [a.uri for a in artifacts]}, "\n".join(map(repr, artifacts)), 0
    if args.step == "finalize":
        opened.finalize(**work)
    elif args.step == "resume":
        la.resume_run(
            opened.uri,
            backend=args.backend,
            storage_options=options,
            dataset_storage_options=options,
            **work,
        )
    status = opened.status()
    return _status(status), str(status), 0


def _status(status: Any) -> dict[str, Any]:
    names = ("uri", "is_trained", "shards", "rows_done", "rows_left", "rows_per_second", "committed")
    return {name: getattr(status, name) for name in names}


def extend(ds: Any, args: argparse.Namespace, bars: bool) -> Result:
    import lance_artifact as la

    done = la.extend_index(ds, args.name, backend=args.backend, memory_limit=args.memory_limit, progress=bars)
    result = {**dataclasses.asdict(done), "rows_dropped": dict(done.rows_dropped)}
    if done.fit is not None:
        result["fit"] |= {"ratio": done.fit.ratio, "rebuild": done.fit.rebuild}
    return result, str(done), 0


def merge(ds: Any, args: argparse.Namespace, bars: bool) -> Result:
    import lance_artifact as la

    done = la.merge_segments(
        ds,
        args.name,
        num_indices_to_merge=args.num_indices_to_merge,
        memory_limit=args.memory_limit,
        progress=bars,
    )
    return dataclasses.asdict(done), str(done), 0


def evaluate(ds: Any, args: argparse.Namespace, bars: bool) -> Result:
    import lance_artifact as la

    found = la.evaluate(
        ds,
        args.name,
        k=args.k,
        num_queries=args.num_queries,
        target_recall=args.target_recall,
        progress=bars,
    )
    if args.plot:
        found.plot(args.plot)
    return json.loads(found.to_json()), str(found), 0
