"""Commands that look: inspect, verify, backends, demo, completion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import _options as options
from ._app import COMPLETE_VARIABLE, Call, Result, app, command
from ._plot import check_plot, plot_sizes


@command("inspect")
@click.argument("artifact")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the partition sizes (needs matplotlib).",
)
@options.storage
def inspect(call: Call, artifact: str, plot: Path | None, storage_option: tuple[str, ...]) -> Result:
    """Sizes, skew and ranges of an ARTIFACT, and what it was encoded from."""
    import numpy as np

    from .. import Artifact

    if plot:
        check_plot(plot)
    opened = Artifact.open(artifact, options.storage_options(storage_option))
    sizes = np.array(opened.partition_sizes(), dtype=np.int64)
    ranges = np.array(opened.partition_range_counts(), dtype=np.int64)
    mean = float(sizes.mean())
    result = {
        "uri": opened.uri,
        "num_rows": opened.num_rows,
        "num_partitions": opened.num_partitions,
        "pq_code_width": opened.pq_code_width,
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
        **opened.manifest,
    }
    if plot:
        plot_sizes(sizes, plot)
        result["plot"] = str(plot)
    rows = result["partition_rows"]
    text = [
        f"{opened.uri}: {opened.num_rows:,} rows in {opened.num_partitions:,} partitions, codes of {opened.pq_code_width} bytes",
        f"  rows a partition: min {rows['min']:,}, median {rows['median']:,.0f}, mean {rows['mean']:,.0f}, p99 {rows['p99']:,.0f}, "
        f"max {rows['max']:,} ({rows['skew']} x mean), {rows['empty']} empty",
        f"  ranges: {result['ranges']['total']:,}, at most {result['ranges']['max_per_partition']} a partition",
    ]
    if opened.model is not None:
        text.append(f"  {opened.model!r}")
    source = opened.manifest.get("source")
    if source:
        text.append(
            f"  encoded from {source['dataset_uri']} version {source['version']}, column {source['column']}, {len(source['fragment_ids'])} fragments"
        )
    return result, "\n".join(text)


@command("verify")
@click.argument("artifact")
@options.storage
def verify(call: Call, artifact: str, storage_option: tuple[str, ...]) -> Result:
    """Check every promise of an ARTIFACT's manifest against its files; exit code 5 where one is broken."""
    from .. import Artifact
    from .._progress import reporter

    report = Artifact.open(artifact, options.storage_options(storage_option)).verify(reporter(call.progress))
    names = ("ok", "num_rows", "num_partitions", "num_files", "num_ranges", "checksums_checked", "part_ids_checked", "duplicate_row_ids", "num_problems", "problems")  # fmt: skip
    result = {name: getattr(report, name) for name in names}
    text = [
        f"{artifact}: {'ok' if report.ok else 'CORRUPT'}, {report.num_rows:,} rows in {report.num_files} files"
    ]
    text += [f"  {problem}" for problem in report.problems]
    if not report.checksums_checked:
        text.append("  note: its writer left no checksums that are known here")
    return result, "\n".join(text), 0 if report.ok else 5


@command("backends")
def backends(call: Call) -> Result:
    """Who can train and encode here, what the others lack, and the memory of GPUs."""
    from .. import available_backends
    from ..backends._cuda import probe

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
    return result, "\n".join(text)


@command("demo")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo-out"),
    help="Folder for dataset, artifact and picture.",
)
@click.option("--limit", type=int, help="Vectors at most. [default: all, about half a million]")
@click.option("--backend", default="auto", help='"auto": a GPU if there is one, else the CPU.')
def demo(call: Call, output: Path, limit: int | None, backend: str) -> Result:
    """Index and search every 8x8 patch of two photographs, beside stock pylance."""
    from .. import demo

    result = demo.run(output, limit=limit, backend=backend, progress=call.progress)
    return result, demo.describe(result)


@command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(call: Call, shell: str) -> Result:
    """Print what makes a SHELL complete this command: source it from the shell's start-up file."""
    from click.shell_completion import get_completion_class

    kind: Any = get_completion_class(shell)
    source = kind(app, {}, "lance-artifact", COMPLETE_VARIABLE).source()
    return {"shell": shell, "source": source}, source
