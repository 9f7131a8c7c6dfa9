"""An index built on a GPU, from pylance's own call, and searched: the vectors are the argument, or random ones.

python examples/cuvs.py [vectors.npy]

Where there is no GPU it says what is missing, and builds on the CPU.
"""

from __future__ import annotations

import sys
import tempfile
import time

import lance
import numpy as np
import pyarrow as pa

import lance_artifact as la


def main(arguments: list[str]) -> None:
    rng = np.random.default_rng(0)
    vectors = np.load(arguments[0]) if arguments else rng.standard_normal((100_000, 128), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        ds = lance.write_dataset(pa.table({"vector": column}), f"{folder}/vectors.lance")
        shape = {"num_partitions": max(1, len(vectors) // 4096), "num_sub_vectors": vectors.shape[1] // 8}
        start = time.perf_counter()
        try:
            ds.create_index("vector", "IVF_PQ", metric="cosine", accelerator="cuvs", **shape)
            where = "GPU"
        except la.BackendUnavailableError as error:
            print(error)
            la.create_index(ds, "vector", metric="cosine", backend="cpu", **shape)
            where = "CPU"
        print(
            f"{len(vectors):,} vectors of {vectors.shape[1]} indexed on the {where} in {time.perf_counter() - start:.1f} s"
        )
        search = {"column": "vector", "q": vectors[123], "k": 5, "nprobes": 10, "refine_factor": 10}
        print("nearest to row 123:", ds.to_table(nearest=search, with_row_id=True)["_rowid"].to_pylist())


if __name__ == "__main__":
    main(sys.argv[1:])
