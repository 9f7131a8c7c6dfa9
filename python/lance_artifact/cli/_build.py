"""Commands that make an index: build, finalize, plan."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import click

from .. import exceptions as errors
from .._lance_artifact import shown_uri
from . import _options as options
from ._app import Call, Result, command
from ._told import figures_text


@command("build")
@click.argument("dataset")
@click.argument("column")
@options.training
@options.committing
@click.option(
    "--append", is_flag=True, help="One more segment of an index; `extend` finds rows and model by itself."
)
@options.backend
@options.assign
@options.fragments
@click.option(
    "--artifact",
    metavar="URI",
    help="Where to lay the artifact out, and keep it. [default: a temporary folder]",
)
@click.option("--artifact-only", is_flag=True, help="Stop before the index; needs --artifact.")
@click.option("--overwrite", is_flag=True, help="With --artifact-only: replace an artifact that is there.")
@click.option(
    "--num-buckets",
    type=int,
    metavar="N",
    help="With --artifact-only: files of the artifact. [default: of its size]",
)
@click.option(
    "--resume",
    is_flag=True,
    help="--artifact is the folder of a run: what an earlier try published there is taken.",
)
@options.shards
@click.option(
    "--verify", is_flag=True, help="Search the index when it is committed, against exact search of 32 rows."
)
@options.memory
@options.storage
def build(call: Call, dataset: str, column: str, storage_option: tuple[str, ...], **given: Any) -> Result:
    """Train, encode, and commit an index of a COLUMN of a DATASET (a path or URI).

    With --artifact it can be taken up again where it ended: by the same command, or `lance-artifact finalize`.
    """
    import lance_artifact as la

    store = options.storage_options(storage_option)
    if given["artifact_only"]:
        _check_artifact_only(given)
    else:
        for what in ("overwrite", "num_buckets"):
            if given[what]:
                raise errors.InvalidInputError(f"--{what.replace('_', '-')}: is of --artifact-only")
    ds = options.open_dataset(dataset, store)
    shape = {key: given[key] for key in _TRAINING}
    work = {
        "backend": given["backend"],
        "devices": given["devices"],
        "device_memory_limit": given["device_memory_limit"],
        "fragment_ids": list(given["fragment"]) or None,
        "memory_limit": given["memory_limit"],
        "progress": call.progress,
    }
    if given["artifact_only"]:
        store = _check_target(ds, column, given, store)
        model = la.train(ds, column, **shape, **work)
        artifact = la.build_artifact(
            ds, column, model, given["artifact"], overwrite=given["overwrite"], num_buckets=given["num_buckets"],
            assign=given["assign"], storage_options=store, **work
        )  # fmt: skip
        figures = call.stages.figures()
        result = {"artifact": artifact.uri, "rows": artifact.manifest["rows"], **figures}
        return result, f"{artifact!r}\n{figures_text(figures)}"
    ds = la.create_index(
        ds, column, given["index_type"], given["name"], replace=given["replace"], append=given["append"], artifact_uri=given["artifact"],
        storage_options=store, resume=given["resume"] or None, num_shards=given["num_shards"], verify=given["verify"],
        assign=given["assign"],         **{key: given[key] for key in _GRAPHS}, **shape, **work,
    )  # fmt: skip
    return _index_result(call, ds, dataset, column, given["name"])


_TRAINING = ("metric", "num_partitions", "num_sub_vectors", "num_bits", "sample_rate", "max_iters", "seed")
_GRAPHS = ("m", "ef_construction", "max_level")


def _check_artifact_only(given: dict[str, Any]) -> None:
    """What has no meaning without an index is refused, and not ignored."""
    if not given["artifact"]:
        raise errors.InvalidInputError("--artifact-only: needs --artifact URI")
    for what, is_given in (
        ("--name", given["name"] is not None),
        ("--replace", given["replace"]),
        ("--append", given["append"]),
        ("--index-type", given["index_type"] != "IVF_PQ"),
        ("-m", given["m"] != 20),
        ("--ef", given["ef_construction"] != 150),
        ("--max-level", given["max_level"] != 7),
        ("--resume", given["resume"]),
        ("--verify", given["verify"]),
        ("--num-shards", given["num_shards"] is not None),
    ):
        if is_given:
            raise errors.InvalidInputError(
                f"{what}: has no meaning with --artifact-only, which makes no index; pass it to lance-artifact finalize"
            )


def _check_target(ds: Any, column: str, given: dict[str, Any], store: Any) -> Any:
    """Before training, which may take an hour: whether the artifact can be written. The storage options for it."""
    from .._arguments import check_target, default_sub_vectors, fragment_list, wanted_partitions
    from .._artifacts import check_place, store_options
    from .._dataset import Handle, vector_column

    handle = Handle.of(ds)
    given["artifact"] = check_place(handle, given["artifact"])
    store = store_options(handle, given["artifact"], store)
    path, dimension = vector_column(handle, column)
    sub_vectors = given["num_sub_vectors"] or default_sub_vectors(dimension, given["num_bits"])[0]
    width = max(1, sub_vectors * given["num_bits"] // 8)
    source = handle.vectors(path, fragment_list(list(given["fragment"]) or None))
    partitions = wanted_partitions(
        given["num_partitions"], None, source.count_rows(), None, given["sample_rate"], whole_table=False
    )
    if not given["overwrite"]:
        check_target(
            source, given["artifact"], partitions, width, given["num_bits"], given["memory_limit"], store
        )
    return store


def _index_result(call: Call, ds: Any, dataset: str, column: str, name: str | None) -> Result:
    """What was committed. By now it is: what cannot be told about it is left out, and is no error."""
    from .._dataset import Handle, vector_column
    from .._wanted import default_name

    wanted = name or f"{column}_idx"
    index, model = None, {}
    with suppress(Exception):
        handle = Handle.of(ds)
        # By now the name that was free for the column is its index's.
        wanted = name or default_name(handle, vector_column(handle, column)[0])
        index = next((i for i in ds.describe_indices() if i.name == wanted), None)
    with suppress(Exception):
        if index is not None:
            said = index.details
            model = {
                "metric": str(said.get("metric_type", "")).lower() or None,
                "num_partitions": ds.stats.index_stats(index.name)["indices"][0].get("num_partitions"),
                "num_sub_vectors": said["compression"].get("num_sub_vectors"),
                "num_bits": said["compression"].get("num_bits"),
                "segments": len(index.segments),
            }
    figures = call.stages.figures()
    result = {
        "dataset": shown_uri(dataset),
        "version": ds.version,
        "index": index.name if index else wanted,
        "index_type": index.index_type if index else None,
        "rows": index.num_rows_indexed if index else None,
        **model,
        **figures,
    }
    over = f" ({index.index_type}) over {index.num_rows_indexed:,} rows" if index else ""
    shape = (
        f"\n  {model['metric']}, {model['num_partitions'] or 0:,} partitions, {model['num_sub_vectors']} sub-vectors of {model['num_bits']} "
        f"bits, {model['segments']} segment{'s' * (model['segments'] != 1)}"
        if model
        else ""
    )
    return result, f"index {result['index']}{over} at version {ds.version}{shape}\n{figures_text(figures)}"


@command("finalize")
@click.argument("dataset")
@click.argument("column")
@click.argument("artifacts", nargs=-1, required=True)
@options.committing
@click.option("--append", is_flag=True, help="One more segment of an index, which covers other fragments.")
@click.option(
    "--fragment",
    type=int,
    multiple=True,
    metavar="ID",
    help="The fragments that are covered, where an artifact does not say it; repeatable.",
)
@options.memory
@options.storage
def finalize(
    call: Call,
    dataset: str,
    column: str,
    artifacts: tuple[str, ...],
    storage_option: tuple[str, ...],
    **given: Any,
) -> Result:
    """Make an index of ARTIFACTS and commit it."""
    import lance_artifact as la

    store = options.storage_options(storage_option)
    if given["append"] and given["replace"]:
        raise errors.InvalidInputError("--append and --replace: pass one of them")
    ds = la.finalize(
        options.open_dataset(dataset, store), column, list(artifacts), name=given["name"], replace=given["replace"],
        mode="append" if given["append"] else None, index_type=given["index_type"], fragment_ids=list(given["fragment"]) or None,
        storage_options=store, memory_limit=given["memory_limit"], progress=call.progress, **{key: given[key] for key in _GRAPHS},
    )  # fmt: skip
    return _index_result(call, ds, dataset, column, given["name"])


@command("plan")
@click.argument("dataset")
@click.argument("column")
@options.training
@options.committing
@options.backend
@options.assign
@options.fragments
@options.shards
@click.option(
    "--run",
    metavar="URI",
    help="Make a run of the plan in this folder: its steps may be done by any number of processes.",
)
@click.option("--no-calibrate", is_flag=True, help="Read no row: say no times.")
@options.storage
def plan(
    call: Call, dataset: str, column: str, run: str | None, storage_option: tuple[str, ...], **given: Any
) -> Result:
    """Say what a build would do, its sizes, and about how long it takes; with --run, prepare it."""
    import lance_artifact as la

    store = options.storage_options(storage_option)
    ds = options.open_dataset(dataset, store)
    made = la.plan(
        ds, column, given["index_type"], given["name"], replace=given["replace"],
        fragment_ids=list(given["fragment"]) or None, backend=given["backend"], devices=given["devices"],
        device_memory_limit=given["device_memory_limit"], num_shards=given["num_shards"], calibrate=not given["no_calibrate"], assign=given["assign"],
        artifact_uri=run, storage_options=store, **{key: given[key] for key in (*_TRAINING, *_GRAPHS)},
    )  # fmt: skip
    text, result = str(made), json.loads(made.to_json())
    if run:
        prepared = la.Run.create(made, run, storage_options=store, dataset_storage_options=store)
        text, result = (
            str(prepared.plan),
            {"run": shown_uri(prepared.uri), "plan": json.loads(prepared.plan.to_json())},
        )
        text += f"\n\nrun {shown_uri(prepared.uri)}: {_left(prepared, ds)}"
    return result, text


def _left(run: Any, ds: Any) -> str:
    """What is to be done of a run; nothing where its index is committed."""
    from .._dataset import Handle
    from .._run_commit import check_uncommitted, is_committed

    handle = Handle.of(ds)
    if is_committed(run, handle):
        return "its index is committed; nothing is left to be done"
    check_uncommitted(run, handle)
    return f"go on with: lance-artifact run resume {shown_uri(run.uri)}"
