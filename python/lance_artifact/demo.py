"""The main job on real vectors: every 8x8 RGB patch of scikit-learn's two photographs, indexed and searched."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from ._build_artifact import build_artifact
from ._dataset import Handle
from ._evaluate import evaluate
from ._exact import Exact
from ._finalize import finalize
from ._train import train
from .backends import resolve_backend
from .exceptions import InvalidInputError, LanceArtifactError

PATCH = 8
DIMENSION = PATCH * PATCH * 3
PARTITIONS, SUB_VECTORS = 256, 24
QUERIES, K, NPROBES, REFINE = 200, 10, 16, 4
TARGET = 0.9
# In the output: what is made anew by each demo, and the mark that one has made them.
FOLDERS = ("patches.lance", "artifact", "stock.lance")
MADE_HERE = ".lance-artifact-demo"


def _photographs() -> list[np.ndarray]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise LanceArtifactError(
            'the demo needs scikit-learn and matplotlib: pip install "lance-artifact[demo]"'
        ) from error
    return list(load_sample_images().images)


def _patches(image: np.ndarray) -> np.ndarray:
    """Every patch of a photograph, one a row: (rows, 192) float32 in 0..1."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (PATCH, PATCH, 3))
    return windows.reshape(-1, DIMENSION).astype(np.float32) / 255


def _write(images: list[np.ndarray], uri: str, limit: int | None) -> lance.LanceDataset:
    def batches() -> Iterator[pa.RecordBatch]:
        left = limit
        for number, image in enumerate(images):
            patches = _patches(image)
            across = image.shape[1] - PATCH + 1
            if left is not None:
                patches = patches[: max(0, left)]
                left -= len(patches)
            for start in range(0, len(patches), 65536):
                part = patches[start : start + 65536]
                at = np.arange(start, start + len(part), dtype=np.int32)
                yield pa.RecordBatch.from_arrays(
                    [
                        pa.array(np.full(len(part), number, np.int8)),
                        pa.array(at // across),
                        pa.array(at % across),
                        pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), DIMENSION),
                    ],
                    schema=schema,
                )

    schema = pa.schema(
        [
            ("image", pa.int8()),
            ("y", pa.int32()),
            ("x", pa.int32()),
            ("vector", pa.list_(pa.float32(), DIMENSION)),
        ]
    )
    reader = pa.RecordBatchReader.from_batches(schema, batches())
    return lance.write_dataset(reader, uri, mode="overwrite", max_rows_per_file=200_000)


class _PeakMemory:
    """Highest resident memory of this process while the block runs, above what it held when the block began."""

    def __enter__(self) -> _PeakMemory:
        self.start = self.peak = _resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, _resident_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, _resident_bytes())


def _resident_bytes() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource
    import sys

    # Elsewhere only the highest value so far is known: bytes on macOS, KiB on other systems.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _recall(ds: lance.LanceDataset, queries: np.ndarray, truth: Exact, **search: Any) -> tuple[float, float]:
    """Mean recall@K and milliseconds a query."""
    hits, seconds = 0, 0.0
    for number, query in enumerate(queries):
        nearest = {"column": "vector", "q": query, "k": K, **search}
        started = time.perf_counter()
        found = ds.to_table(columns=["_distance"], nearest=nearest, with_row_id=True)
        seconds += time.perf_counter() - started
        hits += truth.hits(number, found["_rowid"].to_numpy())
    return hits / truth.wanted, seconds * 1000 / len(queries)


def _check_output(output: Path) -> None:
    """Refuse a folder in which something of other origin would be replaced."""
    there = [name for name in FOLDERS if (output / name).exists() or (output / name).is_symlink()]
    if there and not (output / MADE_HERE).exists():
        raise InvalidInputError(
            f"output: {output} has {', '.join(there)}, which no earlier demo made; choose another folder"
        )


def _make_room(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / MADE_HERE).write_text(
        "The folders of the demo beside this file may be replaced by the next one.\n"
    )
    for name in FOLDERS:
        shutil.rmtree(output / name, ignore_errors=True)


def _picture(ds: lance.LanceDataset, queries: np.ndarray, path: Path, shown: int = 8) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(shown, K + 1, figsize=(K + 1, shown * 1.05))
    for row, query in enumerate(queries[:: max(1, len(queries) // shown)][:shown]):
        nearest = {"column": "vector", "q": query, "k": K, "nprobes": NPROBES, "refine_factor": REFINE}
        found = ds.to_table(columns=["vector", "_distance"], nearest=nearest)
        patches = [query, *(v.values.to_numpy() for v in found["vector"])]
        for cell, patch in zip(axes[row], patches, strict=False):
            cell.imshow(np.clip(patch.reshape(PATCH, PATCH, 3), 0, 1), interpolation="nearest")
        for cell in axes[row]:
            cell.axis("off")
    axes[0][0].set_title("query", fontsize=9)
    axes[0][1].set_title("nearest patches found", fontsize=9, loc="left")
    figure.suptitle(
        f"IVF_PQ through a partition artifact: {ds.count_rows():,} patches of two photographs", fontsize=11
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(
    output: Path,
    *,
    limit: int | None = None,
    backend: str = "auto",
    progress: bool = True,
    stock: bool = True,
) -> dict[str, Any]:
    """Run the demo in a folder and return its figures.

    Parameters
    ----------
    output : Path
        Gets the dataset, the artifact and the pictures.
    limit : int, optional
        Vectors at most; default all of them (about 530,000).
    backend : str, default "auto"
    progress : bool, default True
        Bars on a terminal.
    stock : bool, default True
        Build stock pylance's index too, to compare with.

    Returns
    -------
    dict
        ``rows``, ``recall_at_10``, ``stock_recall_at_10``, ``seconds`` by stage, ``stock_seconds``,
        ``peak_memory_bytes`` (of the build, above what the process held before), ``picture``, ``recall_picture``, ``evaluation`` (as `Evaluation.to_json` gives
        it), and how it was measured.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - started, 3)

    _check_output(output)
    photographs = _photographs()
    _make_room(output)
    with stage("write_dataset"):
        ds = _write(photographs, str(output / "patches.lance"), limit)
    rows = ds.count_rows()
    chosen = resolve_backend(backend)
    common: dict[str, Any] = {"backend": chosen, "progress": progress}
    with _PeakMemory() as memory:
        with stage("train"):
            model = train(ds, "vector", num_partitions=PARTITIONS, num_sub_vectors=SUB_VECTORS, **common)
        with stage("encode_and_write_artifact"):
            artifact = build_artifact(ds, "vector", model, output / "artifact", **common)
        with stage("finalize"):
            finalize(ds, "vector", artifact, name="artifact_idx", progress=progress, backend_name=chosen.name)
    build_seconds = round(sum(seconds[s] for s in ("train", "encode_and_write_artifact", "finalize")), 3)
    random = np.random.default_rng(7)
    picked = np.sort(random.choice(rows, min(QUERIES, rows), replace=False))
    queries = (
        ds.take(picked.tolist(), columns=["vector"])["vector"]
        .combine_chunks()
        .flatten()
        .to_numpy()
        .reshape(-1, DIMENSION)
    )
    # Not themselves in the table: a little noise on the pixels.
    queries = np.clip(queries + random.normal(0, 0.01, queries.shape), 0, 1).astype(np.float32)
    with stage("brute_force"):
        handle = Handle.of(ds)
        truth = Exact(handle, "vector", model.metric, handle.fragment_ids(), queries, K)
    search = {"nprobes": NPROBES, "refine_factor": REFINE}
    recall, milliseconds = _recall(ds, queries, truth, **search)
    picture = output / "found.png"
    _picture(ds, queries, picture)
    evaluation = evaluate(ds, "artifact_idx", queries[:100], target_recall=TARGET)
    curve = output / "recall.png"
    evaluation.plot(curve)
    result: dict[str, Any] = {
        "rows": rows,
        "recall_at_10": round(recall, 4),
        "stock_recall_at_10": None,
        "seconds": {**seconds, "build": build_seconds},
        "stock_seconds": None,
        "peak_memory_bytes": memory.peak - memory.start,
        "picture": str(picture),
        "recall_picture": str(curve),
        "evaluation": json.loads(evaluation.to_json()),
        "search_milliseconds": round(milliseconds, 2),
        "backend": chosen.name,
        "dropped": artifact.manifest["rows"]["dropped"],
        "parameters": {
            "dimension": DIMENSION,
            "num_partitions": PARTITIONS,
            "num_sub_vectors": SUB_VECTORS,
            "queries": len(queries),
            **search,
        },
    }
    if stock:
        # The same rows in a dataset without our index, so that each search has just one to choose.
        shutil.copytree(output / "patches.lance", output / "stock.lance")
        other = lance.dataset(str(output / "stock.lance"))
        other.drop_index("artifact_idx")
        started = time.perf_counter()
        other.create_index("vector", "IVF_PQ", num_partitions=PARTITIONS, num_sub_vectors=SUB_VECTORS)
        result["stock_seconds"] = round(time.perf_counter() - started, 3)
        result["stock_recall_at_10"] = round(_recall(other, queries, truth, **search)[0], 4)
        shutil.rmtree(output / "stock.lance", ignore_errors=True)
    return result


def _advice(evaluation: dict[str, Any]) -> str:
    """The cheapest setting for the recall that is wanted."""
    target, found = evaluation["target_recall"], evaluation["cheapest"]
    if found is None:
        return f"no setting reaches a recall of {target}"
    return (
        f"for a recall of {target}: nprobes={found['nprobes']}, refine_factor={found['refine_factor']} "
        f"({found['rows_scanned']:,.0f} rows scanned, {found['latency_ms']:.2f} ms)"
    )


def describe(result: dict[str, Any]) -> str:
    """The figures for people."""
    parameters = result["parameters"]
    lines = [
        f"{result['rows']:,} vectors of {parameters['dimension']} float32 values, backend {result['backend']}, "
        f"dropped {sum(result['dropped'].values())}",
        "",
        *(f"  {name:<28}{value:>9.2f} s" for name, value in result["seconds"].items()),
    ]
    if result["stock_seconds"] is not None:
        lines.append(f"  {'stock pylance create_index':<28}{result['stock_seconds']:>9.2f} s")
    lines += [
        "",
        f"  {'peak memory of the build':<28}{result['peak_memory_bytes'] / 2**20:>9.0f} MiB above the start",
        f"  {'recall@10':<28}{result['recall_at_10']:>9.4f}   against brute force, {parameters['queries']} queries, "
        f"nprobes={parameters['nprobes']}, refine_factor={parameters['refine_factor']}",
    ]
    if result["stock_recall_at_10"] is not None:
        lines.append(
            f"  {'recall@10 of stock':<28}{result['stock_recall_at_10']:>9.4f}   same parameters and queries"
        )
    lines += [
        f"  {'one search':<28}{result['search_milliseconds']:>9.2f} ms",
        f"  {_advice(result['evaluation'])}",
        "",
        f"  recall against rows scanned: {result['recall_picture']}",
        f"  picture: {result['picture']}",
    ]
    return "\n".join(lines)
