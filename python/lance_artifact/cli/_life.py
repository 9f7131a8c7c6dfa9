"""Commands of an index's whole life: run, clean, extend, merge, evaluate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from .. import exceptions as errors
from . import _options as options
from ._app import Call, Result, command
from ._plot import check_plot
from ._told import figures_text


@command("run")
@click.argument("step", type=click.Choice(["status", "train", "encode", "finalize", "resume", "clean"]))
@click.argument("uri")
@click.option("--shard", type=int, multiple=True, metavar="N", help="Of encode: which; repeatable.")
@options.backend
@options.memory
@click.option("--all", "everything", is_flag=True, help="Of clean: the run itself too.")
@click.option("--elsewhere", is_flag=True, help="Of clean: what processes of other machines began, too.")
@click.option("--dry-run", is_flag=True, help="Of clean: only list.")
@options.storage
def run(
    call: Call,
    step: str,
    uri: str,
    shard: tuple[int, ...],
    everything: bool,
    elsewhere: bool,
    dry_run: bool,
    storage_option: tuple[str, ...],
    **given: Any,
) -> Result:
    """A STEP of the run in the folder URI: each may be repeated, by any number of processes.

    `lance-artifact plan --run URI` prepares one; resume does whatever is left.
    """
    import lance_artifact as la

    store = options.storage_options(storage_option)
    if shard and step != "encode":
        raise la.InvalidInputError("--shard: is of encode")
    if (everything or elsewhere or dry_run) and step != "clean":
        raise la.InvalidInputError("--all, --elsewhere and --dry-run: are of clean")
    if step == "clean":
        return _clean(uri, everything, elsewhere, dry_run, store)
    opened = la.Run.open(uri, storage_options=store, dataset_storage_options=store)
    work: dict[str, Any] = {"memory_limit": given["memory_limit"], "progress": call.progress}
    on = {key: given[key] for key in ("backend", "devices", "device_memory_limit")}
    if step == "train":
        model = opened.train(**on, **work)
        return {"model": model.fingerprint, **call.stages.figures()}, f"{model!r}"
    if step == "encode":
        if not shard:
            raise la.InvalidInputError("--shard: which one? See lance-artifact run status")
        artifacts = [opened.encode(each, **on, **work) for each in shard]
        result = {"artifacts": [a.uri for a in artifacts], **call.stages.figures()}
        return result, "\n".join(map(repr, artifacts))
    if step == "finalize":
        opened.finalize(**work)
    elif step == "resume":
        la.resume_run(opened.uri, storage_options=store, dataset_storage_options=store, **on, **work)
    status = opened.status()
    names = ("uri", "is_trained", "shards", "rows_done", "rows_left", "rows_per_second", "committed")
    text = str(status) if step == "status" else f"{status}\n{figures_text(call.stages.figures())}"
    return {**{name: getattr(status, name) for name in names}, **call.stages.figures()}, text


def _clean(uri: str, everything: bool, elsewhere: bool, dry_run: bool, store: Any) -> Result:
    import lance_artifact as la

    found = la.clean_run(
        uri, everything=everything, elsewhere=elsewhere, dry_run=dry_run, storage_options=store, dataset_storage_options=store,
    )  # fmt: skip
    said = "would be removed" if dry_run else "removed"
    text = "\n".join([*map(str, found), f"{len(found)} {said}"])
    return {said: [dataclasses.asdict(each) for each in found]}, text


@command("clean")
@click.argument("uri")
@click.option("--all", "everything", is_flag=True, help="The run itself, with its artifacts, too.")
@click.option(
    "--elsewhere", is_flag=True, help="What processes of other machines began, which you have stopped, too."
)
@click.option("--dry-run", is_flag=True, help="Only list.")
@options.storage
def clean(
    call: Call, uri: str, everything: bool, elsewhere: bool, dry_run: bool, storage_option: tuple[str, ...]
) -> Result:
    """Remove what killed tries of the run in the folder URI left."""
    return _clean(uri, everything, elsewhere, dry_run, options.storage_options(storage_option))


@command("extend")
@click.argument("dataset")
@click.argument("name")
@options.backend
@options.assign
@options.fragments
@click.option(
    "--artifact",
    metavar="URI",
    help="Where to lay the artifact out, and keep it. [default: a temporary folder]",
)
@click.option("--no-fit", is_flag=True, help="Do not look at how well the model fits the new rows.")
@options.memory
@options.storage
def extend(call: Call, dataset: str, name: str, storage_option: tuple[str, ...], **given: Any) -> Result:
    """Index what came to a DATASET since the index NAME was built, with its model."""
    import lance_artifact as la

    store = options.storage_options(storage_option)
    done = la.extend_index(
        options.open_dataset(dataset, store), name, fragment_ids=list(given["fragment"]) or None, backend=given["backend"],
        devices=given["devices"], device_memory_limit=given["device_memory_limit"], artifact_uri=given["artifact"], memory_limit=given["memory_limit"], storage_options=store,
        measure_fit=not given["no_fit"], assign=given["assign"], progress=call.progress,
    )  # fmt: skip
    figures = call.stages.figures()
    result = {**figures, **dataclasses.asdict(done), "rows_dropped": dict(done.rows_dropped)}
    if done.fit is not None:
        result["fit"] |= {"ratio": done.fit.ratio, "rebuild": done.fit.rebuild}
    return result, f"{done}\n{figures_text(figures)}"


@command("merge")
@click.argument("dataset")
@click.argument("name")
@click.option("--num-indices-to-merge", type=int, metavar="N", help="The newest only. [default: all]")
@options.memory
@options.storage
def merge(call: Call, dataset: str, name: str, storage_option: tuple[str, ...], **given: Any) -> Result:
    """Put the segments of the index NAME together, without rows that were deleted or updated."""
    import lance_artifact as la

    ds = options.open_dataset(dataset, options.storage_options(storage_option))
    done = la.merge_segments(ds, name, progress=call.progress, **given)
    figures = call.stages.figures()
    return {**figures, **dataclasses.asdict(done)}, f"{done}\n{figures_text(figures)}"


@command("evaluate")
@click.argument("dataset")
@click.argument("name")
@click.option("--k", type=int, default=10, help="Neighbours of each query.")
@click.option(
    "--num-queries", type=int, default=100, help="Rows of the table that are searched for; more is surer."
)
@click.option(
    "--target-recall",
    type=float,
    metavar="R",
    help="Name the cheapest setting that reaches it, such as 0.95.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw recall against rows scanned (needs matplotlib).",
)
@options.storage
def evaluate(
    call: Call, dataset: str, name: str, plot: Path | None, storage_option: tuple[str, ...], **given: Any
) -> Result:
    """Recall, rows scanned and latency of the index NAME over a grid of nprobes and refine_factor."""
    import lance_artifact as la

    if plot:
        check_plot(plot)
    ds = options.open_dataset(dataset, options.storage_options(storage_option))
    found = la.evaluate(ds, name, progress=call.progress, **given)
    if plot:
        try:
            found.plot(str(plot))
        except OSError as error:
            raise errors.StorageError(f"--plot: {plot} cannot be written: {error}") from error
    return json.loads(found.to_json()), str(found)
