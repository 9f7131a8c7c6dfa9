"""The command `lance-artifact`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# What the statistics of an index hold; said here so that pylance does not warn about its default on every run.
os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")

from . import _cli_life
from . import exceptions as errors

EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.ArtifactNotFoundError, 3),
    (errors.ArtifactExistsError, 4),
    (errors.CorruptArtifactError, 5),
    (errors.ArtifactMismatchError, 6),
    (errors.BackendUnavailableError, 7),
    (errors.CommitConflictError, 8),
    (errors.IndexExistsError, 9),
    (errors.StorageError, 10),
    (errors.DeviceError, 11),
    (errors.InvalidInputError, 2),
    (errors.ColumnNotFoundError, 2),
    (errors.ColumnTypeError, 2),
    (KeyboardInterrupt, 130),
)

EPILOG = """exit codes:
  0 done   1 unexpected error   2 bad argument, column or input   3 no artifact there   4 an artifact is there
  5 corrupt artifact   6 artifact does not fit   7 backend unavailable   8 commit conflict   9 index exists
  10 storage error   11 device error   130 interrupted"""


def _options(values: list[str] | None) -> dict[str, str] | None:
    if not values:
        return None
    pairs = {}
    for value in values:
        key, sign, text = value.partition("=")
        if not sign:
            raise errors.InvalidInputError(f"--storage-option: got {value!r}, expected KEY=VALUE")
        pairs[key] = text
    return pairs


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="lance-artifact",
        description="IVF_PQ vector indexes for stock Lance through partition artifacts.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        made.add_argument("--no-progress", action="store_true", help="no bars, even on a terminal")
        return made

    def storage(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--storage-option",
            action="append",
            metavar="KEY=VALUE",
            help="of dataset and artifact; repeatable",
        )

    def training(made: argparse.ArgumentParser, required: bool = True) -> None:
        made.add_argument("--metric", default="l2", choices=["l2", "cosine", "dot"])
        made.add_argument("--num-partitions", type=int, metavar="K")
        made.add_argument("--num-sub-vectors", type=int, required=required, metavar="M")
        made.add_argument("--num-bits", type=int, default=8, choices=[4, 8])
        made.add_argument("--sample-rate", type=int, default=256)
        made.add_argument("--max-iters", type=int, default=50)
        made.add_argument("--seed", type=int, default=0)

    def committing(made: argparse.ArgumentParser) -> None:
        made.add_argument("--index-type", default="IVF_PQ", choices=["IVF_PQ", "IVF_HNSW_PQ"])
        made.add_argument("--name", help="of the index; default COLUMN_idx")
        made.add_argument("--replace", action="store_true", help="replace an index of that name")

    demo = command("demo", "index and search every 8x8 patch of two photographs, beside stock pylance")
    demo.add_argument(
        "--output", type=Path, default=Path("demo-out"), help="folder for dataset, artifact and picture"
    )
    demo.add_argument("--limit", type=int, help="vectors at most")
    demo.add_argument("--backend", default="auto")

    build = command("build", "train, encode and (unless --artifact-only) commit an index")
    build.add_argument("dataset")
    build.add_argument("column")
    training(build)
    committing(build)
    build.add_argument("--backend", default="auto")
    build.add_argument(
        "--devices", type=_devices, metavar="N,N", help="GPUs that share the rows; default the first"
    )
    build.add_argument("--artifact", metavar="URI", help="where to lay the artifact out, and keep it")
    build.add_argument(
        "--resume",
        action="store_true",
        help="--artifact is the folder of a run: what an earlier try published there is taken",
    )
    build.add_argument("--verify", action="store_true", help="search the index when it is committed")
    build.add_argument("--num-shards", type=int, metavar="N", help="artifacts of a run; needs --resume")
    build.add_argument("--artifact-only", action="store_true", help="stop before the index; needs --artifact")
    build.add_argument(
        "--fragment", type=int, action="append", metavar="ID", help="only these fragments; repeatable"
    )
    build.add_argument("--memory-limit", type=int, metavar="BYTES", help="of the whole command")
    storage(build)

    final = command("finalize", "make an index of artifacts and commit it")
    final.add_argument("dataset")
    final.add_argument("column")
    final.add_argument("artifacts", nargs="+", metavar="artifact")
    committing(final)
    final.add_argument(
        "--fragment",
        type=int,
        action="append",
        metavar="ID",
        help="the fragments that are covered, where an artifact does not say it; repeatable",
    )
    final.add_argument("--memory-limit", type=int, metavar="BYTES", help="of the whole command")
    storage(final)

    inspect = command("inspect", "sizes, skew and ranges of an artifact")
    inspect.add_argument("artifact")
    inspect.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the partition sizes (needs matplotlib)"
    )
    storage(inspect)

    verify = command("verify", "check every promise of an artifact's manifest against its files")
    verify.add_argument("artifact")
    storage(verify)

    _cli_life.add(command, lambda made: training(made, required=False), committing)

    command("backends", "who can train and encode here, and what the others lack")
    return parser


def _devices(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected device indices such as 0 or 0,1") from None


def _demo(args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from . import demo

    result = demo.run(args.output, limit=args.limit, backend=args.backend, progress=_bars(args))
    return result, demo.describe(result), 0


def _bars(args: argparse.Namespace) -> bool:
    return not args.no_progress and not args.json


def _open_dataset(args: argparse.Namespace) -> Any:
    import lance

    try:
        return lance.dataset(args.dataset, storage_options=_options(args.storage_option))
    except (ValueError, OSError) as error:
        raise errors.InvalidInputError(f"dataset {args.dataset!r} cannot be opened: {error}") from error


def _index_result(ds: Any, args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    """What was committed. By now it is: what cannot be told about it is left out, and is no error."""
    wanted = args.name or f"{args.column}_idx"
    index = None
    with suppress(Exception):
        indices = list(ds.describe_indices())
        # The default name has the column as the schema spells it, which may be another case than the caller's.
        index = next((i for i in indices if i.name == wanted), None) or next(
            (i for i in indices if i.name.lower() == wanted.lower()), None
        )
    result = {
        "dataset": args.dataset,
        "version": ds.version,
        "index": index.name if index else wanted,
        "index_type": index.index_type if index else None,
        "rows": index.num_rows_indexed if index else None,
    }
    over = f" ({index.index_type}) over {index.num_rows_indexed:,} rows" if index else ""
    return result, f"index {result['index']}{over} at version {ds.version}", 0


def _check_artifact_only(args: argparse.Namespace) -> None:
    """What has no meaning without an index is refused, and not ignored."""
    if not args.artifact:
        raise errors.InvalidInputError("--artifact-only: needs --artifact URI")
    for what, given in (
        ("--name", args.name is not None),
        ("--replace", args.replace),
        ("--index-type", args.index_type != "IVF_PQ"),
        ("--resume", args.resume),
        ("--verify", args.verify),
        ("--num-shards", args.num_shards is not None),
    ):
        if given:
            raise errors.InvalidInputError(
                f"{what}: has no meaning with --artifact-only, which makes no index; pass it to lance-artifact finalize"
            )


def _check_target(ds: Any, args: argparse.Namespace, options: Any) -> Any:
    """Before training, which may take an hour: whether the artifact can be written. The storage options for it."""
    from ._arguments import check_target, fragment_list, wanted_partitions
    from ._artifacts import check_place, store_options
    from ._dataset import Handle, vector_column

    handle = Handle.of(ds)
    args.artifact = check_place(handle, args.artifact)
    options = store_options(handle, args.artifact, options)
    width = max(1, args.num_sub_vectors * args.num_bits // 8)
    source = handle.vectors(vector_column(handle, args.column)[0], fragment_list(args.fragment))
    partitions = wanted_partitions(args.num_partitions, None, source.count_rows(), None, args.sample_rate)
    check_target(source, args.artifact, partitions, width, args.num_bits, args.memory_limit, options)
    return options


def _build(args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    import lance_artifact as la

    options = _options(args.storage_option)
    if args.artifact_only:
        _check_artifact_only(args)
    ds = _open_dataset(args)
    parameters = {
        "metric": args.metric,
        "num_partitions": args.num_partitions,
        "num_sub_vectors": args.num_sub_vectors,
        "num_bits": args.num_bits,
        "sample_rate": args.sample_rate,
        "max_iters": args.max_iters,
        "seed": args.seed,
        "fragment_ids": args.fragment,
        "backend": args.backend,
        "devices": args.devices,
        "progress": _bars(args),
    }
    if args.artifact_only:
        options = _check_target(ds, args, options)
        model = la.train(ds, args.column, memory_limit=args.memory_limit, **parameters)
        artifact = la.build_artifact(
            ds, args.column, model, args.artifact, backend=args.backend, devices=args.devices, fragment_ids=args.fragment,
            memory_limit=args.memory_limit, storage_options=options, progress=_bars(args),
        )  # fmt: skip
        return {"artifact": artifact.uri, "rows": artifact.manifest["rows"]}, f"{artifact!r}", 0
    ds = la.create_index(
        ds, args.column, args.index_type, args.name, replace=args.replace, artifact_uri=args.artifact,
        memory_limit=args.memory_limit, storage_options=options, resume=args.resume or None, num_shards=args.num_shards, verify=args.verify, **parameters,
    )  # fmt: skip
    return _index_result(ds, args)


def _plan(args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    return _cli_life.plan(_open_dataset(args), args, _options(args.storage_option))


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    return _cli_life.run(args, _options(args.storage_option), _bars(args))


def _extend(args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    return _cli_life.extend(_open_dataset(args), args, _bars(args))


def _merge(args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    return _cli_life.merge(_open_dataset(args), args, _bars(args))


def _evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    if args.plot:
        _check_plot(Path(args.plot))
    return _cli_life.evaluate(_open_dataset(args), args, _bars(args))


def _finalize(args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    import lance_artifact as la

    ds = la.finalize(
        _open_dataset(args), args.column, args.artifacts, name=args.name, replace=args.replace,
        index_type=args.index_type, fragment_ids=args.fragment, storage_options=_options(args.storage_option),
        memory_limit=args.memory_limit, progress=_bars(args),
    )  # fmt: skip
    return _index_result(ds, args)


def _inspect(args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    import numpy as np

    from . import Artifact

    if args.plot:
        _check_plot(args.plot)
    artifact = Artifact.open(args.artifact, _options(args.storage_option))
    sizes = np.array(artifact.partition_sizes(), dtype=np.int64)
    ranges = np.array(artifact.partition_range_counts(), dtype=np.int64)
    mean = float(sizes.mean())
    result = {
        "uri": artifact.uri,
        "num_rows": artifact.num_rows,
        "num_partitions": artifact.num_partitions,
        "pq_code_width": artifact.pq_code_width,
        "partition_rows": {
            "min": int(sizes.min()),
            "median": float(np.median(sizes)),
            "mean": round(mean, 2),
            "p99": float(np.percentile(sizes, 99)),
            "max": int(sizes.max()),
            "empty": int((sizes == 0).sum()),
            "skew": round(float(sizes.max()) / mean, 3) if mean else None,
        },
        "ranges": {"total": int(ranges.sum()), "max_per_partition": int(ranges.max())},
        **artifact.manifest,
    }
    if args.plot:
        _plot(sizes, args.plot)
        result["plot"] = str(args.plot)
    rows = result["partition_rows"]
    text = [
        f"{artifact.uri}: {artifact.num_rows:,} rows in {artifact.num_partitions:,} partitions, codes of {artifact.pq_code_width} bytes",
        f"  rows a partition: min {rows['min']:,}, median {rows['median']:,.0f}, mean {rows['mean']:,.0f}, p99 {rows['p99']:,.0f}, "
        f"max {rows['max']:,} ({rows['skew']} x mean), {rows['empty']} empty",
        f"  ranges: {result['ranges']['total']:,}, at most {result['ranges']['max_per_partition']} a partition",
    ]
    if artifact.model is not None:
        text.append(f"  {artifact.model!r}")
    source = artifact.manifest.get("source")
    if source:
        text.append(
            f"  encoded from {source['dataset_uri']} version {source['version']}, column {source['column']}, {len(source['fragment_ids'])} fragments"
        )
    return result, "\n".join(text), 0


def _check_plot(path: Path) -> None:
    """Everything that drawing could fail on is known before the artifact is read."""
    try:
        import matplotlib
    except ImportError as error:
        raise errors.InvalidInputError(
            '--plot: needs matplotlib: pip install "lance-artifact[demo]"'
        ) from error
    matplotlib.use("Agg")
    from matplotlib.backend_bases import FigureCanvasBase

    # pgf needs LaTeX.
    known = sorted({*FigureCanvasBase.get_supported_filetypes()} - {"pgf"})
    if path.suffix.lower().removeprefix(".") not in known:
        raise errors.InvalidInputError(
            f"--plot: got {path}, expected a file name with one of the endings {', '.join(known)}"
        )
    if path.is_dir():
        raise errors.InvalidInputError(f"--plot: {path} is a folder, expected the name of a file")
    if not path.parent.is_dir():
        raise errors.InvalidInputError(f"--plot: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise errors.InvalidInputError(f"--plot: {path} cannot be written; choose another place")


def _plot(sizes: Any, path: Path) -> None:
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    axis.plot(np.sort(sizes)[::-1], drawstyle="steps-post")
    axis.axhline(sizes.mean(), color="gray", linestyle="--", label=f"mean {sizes.mean():,.0f}")
    axis.set(
        xlabel="partitions, largest first",
        ylabel="rows",
        title=f"{sizes.sum():,} rows in {len(sizes):,} partitions",
        ylim=(0, None),
    )
    axis.legend()
    try:
        figure.savefig(path, dpi=120)
    except Exception as error:
        raise errors.StorageError(f"--plot: {path} cannot be written: {error}") from error
    finally:
        plt.close(figure)


def _verify(args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from . import Artifact
    from ._progress import reporter

    report = Artifact.open(args.artifact, _options(args.storage_option)).verify(reporter(_bars(args)))
    names = ("ok", "num_rows", "num_partitions", "num_files", "num_ranges", "checksums_checked", "part_ids_checked", "duplicate_row_ids", "num_problems", "problems")  # fmt: skip
    result = {name: getattr(report, name) for name in names}
    text = [
        f"{args.artifact}: {'ok' if report.ok else 'CORRUPT'}, {report.num_rows:,} rows in {report.num_files} files"
    ]
    text += [f"  {problem}" for problem in report.problems]
    if not report.checksums_checked:
        text.append("  note: its writer left no checksums that are known here")
    return result, "\n".join(text), 0 if report.ok else 5


def _backends(_: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from . import available_backends
    from .backends._cuda import probe

    found = available_backends()
    result: dict[str, Any] = {
        n: {"available": a.ok, "missing": list(a.missing), "details": a.details} for n, a in found.items()
    }
    text = []
    for name, availability in found.items():
        text.append(f"{name}: {'available' if availability.ok else 'not available'}")
        text += [f"  missing {reason}" for reason in availability.missing]
    # Starts the devices, which only this command does without work for them.
    result["cuda"] = probe(free_memory=True)
    for device in result["cuda"]["devices"]:
        text.append(
            f"CUDA device {device['index']}: {device['name']}, compute capability {'.'.join(map(str, device['compute_capability']))}, "
            f"{device['free_memory'] / 2**30:.1f} of {device['total_memory'] / 2**30:.1f} GiB free"
        )
    return result, "\n".join(text), 0


_COMMANDS = {
    "demo": _demo,
    "build": _build,
    "finalize": _finalize,
    "plan": _plan,
    "run": _run,
    "extend": _extend,
    "merge": _merge,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "verify": _verify,
    "backends": _backends,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors go to stderr, results to stdout."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    args = _parser().parse_args(arguments)
    try:
        result, text, code = _COMMANDS[args.command](args)
    except (errors.LanceArtifactError, KeyboardInterrupt) as error:
        code = next((c for kind, c in EXIT_CODES if isinstance(error, kind)), 1)
        message = str(error) or "interrupted"
        if args.json:
            print(json.dumps({"error": type(error).__name__, "message": message}))
        print(f"lance-artifact {args.command}: {message}", file=sys.stderr)
        return code
    print(json.dumps(result) if args.json else text)
    return code


if __name__ == "__main__":
    sys.exit(main())
