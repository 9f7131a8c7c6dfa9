"""What this package takes for granted of cuVS, looked at on the device: `python benches/gpu_contract.py [--json FILE]`.

Encodes random vectors with a random model, and compares each label with numpy's in float64 and each code with that of the label's residual.
A difference is a tie within rounding, or a failure; TF32, to which cuVS rounds on some architectures, allows for more. Then: a stream of
ours, a second build in the same process, and builds where little of the device's memory is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

ROWS = (8192, 4096, 4095, 100)
K, DIM, M = 1000, 64, 8
# Differences of distances, to the vector's square: of float32 sums, and of sums of TF32 products.
FLOAT32, TF32 = 1e-5, 5e-3
LEFT_MIB = (700, 300, 150)


def column(array: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


def models(bits: int) -> dict[str, Any]:
    import lance_artifact as la

    rng = np.random.default_rng(bits)
    centroids = rng.standard_normal((K, DIM), np.float32)
    codebook = rng.standard_normal((M, 1 << bits, DIM // M), np.float32)
    unit = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    return {"l2": la.IvfPqModel(centroids, codebook, "l2"), "dot": la.IvfPqModel(unit, codebook, "dot")}


def unpacked(codes: np.ndarray, bits: int) -> np.ndarray:
    """A code for each sub-vector: of 4 bits the low half of a byte is the first."""
    return codes if bits == 8 else np.stack([codes & 15, codes >> 4], 2).reshape(len(codes), -1)


def compare(model: Any, vectors: np.ndarray, labels: np.ndarray, codes: np.ndarray) -> dict[str, Any]:
    """Labels and codes that are not the nearest, and by how much of the vector's square the worst of them is farther."""
    from lance_artifact.backends._vectors import as_matrix, codebook_array

    exact = vectors.astype(np.float64)
    centroids = as_matrix(model.ivf_centroids).astype(np.float64)
    codebook = codebook_array(model).astype(np.float64)
    squares = (exact**2).sum(1)
    distances = (0 if model.metric == "dot" else (centroids**2).sum(1)[None]) - 2 * exact @ centroids.T
    best = distances.min(1)
    label_gaps = (distances[np.arange(len(labels)), labels] - best) / squares
    residuals = exact if model.metric == "dot" else exact - centroids[labels]
    unpacked_codes = unpacked(codes, model.num_bits)
    code_gaps = []
    for m in range(M):
        part = residuals[:, m * DIM // M : (m + 1) * DIM // M]
        far = ((part[:, None] - codebook[m][None]) ** 2).sum(2)
        code_gaps.append((far[np.arange(len(part)), unpacked_codes[:, m]] - far.min(1)) / squares)
    code_gap = np.stack(code_gaps)
    return {
        "labels_that_differ": int((labels != distances.argmin(1)).sum()),
        "worst_label": float(label_gaps.max()),
        "codes_that_differ": int((code_gap > 0).sum()),
        "worst_code": float(code_gap.max()),
    }


def encodings() -> list[dict[str, Any]]:
    from lance_artifact._lance_artifact import _CudaDevice
    from lance_artifact.backends import available_backends
    from lance_artifact.backends._cuvs_calls import Cuvs
    from lance_artifact.backends.cuvs import EXACT_ROWS, CuvsBackend

    major = available_backends()["cuvs"].details["devices"][0]["compute_capability"][0]
    found = []
    for bits in (4, 8):
        for metric, model in models(bits).items():
            for dtype in ("float32", "float16"):
                encoder, library = CuvsBackend().encoder(model), Cuvs()
                with _CudaDevice(0), contextlib.closing(encoder.open(0, 0)) as session:
                    for rows in ROWS:
                        vectors = np.random.default_rng(rows).standard_normal((rows, DIM), np.float32)
                        vectors = vectors.astype(dtype)
                        part_id = library.empty((rows,), np.uint32)
                        pq_code = library.empty((rows, model.pq_code_width), np.uint8)
                        # Arrays of cuVS's own: those of the pipeline would be widened.
                        session.encode(library.to_device(vectors), part_id, pq_code)
                        session.finish()
                        result = compare(model, vectors, part_id.copy_to_host(), pq_code.copy_to_host())
                        rounds = major >= 10 or (major == 9 and rows < EXACT_ROWS)
                        allowed = TF32 if rounds else FLOAT32
                        ok = result["worst_label"] <= allowed and result["worst_code"] <= FLOAT32
                        found.append(
                            {
                                "metric": metric,
                                "dtype": dtype,
                                "bits": bits,
                                "rows": rows,
                                **result,
                                "ok": bool(ok),
                            }
                        )
                        del part_id, pq_code
    return found


def looked(name: str, work: Callable[[], str]) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        seen, ok = work(), True
    except Exception as error:
        seen, ok = f"{type(error).__name__}: {error}", False
    return {"what": name, "seen": seen, "seconds": round(time.perf_counter() - began, 3), "ok": ok}


def a_stream_of_ours() -> str:
    from lance_artifact.backends._cuvs_calls import Cuvs

    library = Cuvs()
    if library.lacking():
        raise RuntimeError(f"lacking: {library.lacking()}")
    through = "its C interface" if library.c_interface else "its Python package, one thread at a time"
    return f"encodes through {through}"


def builds(folder: Path, rows: int, dimension: int) -> list[dict[str, Any]]:
    """A first and a second build, and builds with little memory left: smaller batches, or an error that says what is missing."""
    import lance

    import lance_artifact as la
    from lance_artifact._lance_artifact import _CudaDevice
    from lance_artifact.backends._cuvs_calls import Cuvs, in_pool

    array = np.random.default_rng(0).standard_normal((rows, dimension), np.float32)
    ds = lance.write_dataset(pa.table({"vector": column(array)}), str(folder / "d"))
    shape = {"num_partitions": 64, "num_sub_vectors": dimension // 8, "sample_rate": 32, "max_iters": 10}
    model = la.train(ds, "vector", backend="cpu", **shape)

    def train() -> str:
        return repr(la.train(ds, "vector", backend="cuvs", **shape))

    def encode(name: str) -> str:
        artifact = la.build_artifact(ds, "vector", model, folder / name, backend="cuvs", overwrite=True)
        if artifact.num_rows != rows or not artifact.verify().ok:
            raise RuntimeError(f"{artifact.num_rows} rows of {rows}")
        return f"{rows} rows"

    found = [looked(f"{which} training in the process", train) for which in ("first", "second")]
    found += [
        looked(f"{which} build in the process", lambda which=which: encode(which))
        for which in ("first", "second")
    ]
    for left in LEFT_MIB:
        with _CudaDevice(0) as device, in_pool(0):
            taken = device.free_memory() - (left << 20)
            if taken <= 0:
                found.append(
                    {"what": f"{left} MiB left", "seen": "the device has less", "seconds": 0.0, "ok": True}
                )
                continue
            hog = Cuvs().empty((taken,), np.uint8)
            result = looked(f"{left} MiB left", lambda: encode("full"))
            # An error of ours that says so is as good.
            result["ok"] = result["ok"] or result["seen"].startswith("DeviceMemoryError")
            del hog
        found.append(result)
    found.append(looked("a build after those", lambda: encode("after")))
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000, help="of the builds")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--encodings-only", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("gpu-contract.json"))
    a = parser.parse_args(arguments)
    from lance_artifact.backends import available_backends

    found = available_backends()["cuvs"]
    if not found.ok:
        print("; ".join(found.missing), file=sys.stderr)
        return 1
    results = {"encodings": encodings(), "looks": [looked("cuVS", a_stream_of_ours)]}
    if not a.encodings_only:
        with tempfile.TemporaryDirectory(prefix="contract-") as folder:
            results["looks"] += builds(Path(folder), a.rows, a.dim)
    columns = list(results["encodings"][0])
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for line in results["encodings"]:
        print(f"| {' | '.join(f'{v:.1e}' if isinstance(v, float) else str(v) for v in line.values())} |")
    print("\n| what | seen | seconds | ok |\n|---|---|---|---|")
    for line in results["looks"]:
        print(f"| {' | '.join(str(v) for v in line.values())} |")
    a.json.write_text(json.dumps(results, indent=1))
    return 0 if all(line["ok"] for part in results.values() for line in part) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
