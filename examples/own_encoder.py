"""An encoder of your own, end to end: train anywhere, hand the encoded rows over, search with stock pylance.

python examples/own_encoder.py
"""

from __future__ import annotations

import tempfile

import lance
import numpy as np
import pyarrow as pa

import lance_artifact as la

ROWS, DIM, K, M = 20_000, 64, 32, 8


def main() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((ROWS, DIM)).astype("float32")
    with tempfile.TemporaryDirectory() as folder:
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), DIM)
        ds = lance.write_dataset(pa.table({"vector": column}), f"{folder}/t.lance")

        # A model from anywhere: here centroids are rows, and codewords residuals of other rows.
        centroids = vectors[:K]
        others = vectors[K : K + 256]
        nearest = ((others[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)
        codebook = (others - centroids[nearest]).reshape(256, M, DIM // M).transpose(1, 0, 2).copy()
        model = la.IvfPqModel(centroids, codebook, metric="l2")

        # The vectors that an index holds: what Lance leaves out is dropped here, and counted.
        scan = la.prepared_vectors(ds, "vector", metric=model.metric)
        with la.PartitionArtifactBuilder(f"{folder}/artifact", model, source=scan.source) as builder:
            for batch in scan:
                block = batch["vector"].flatten().to_numpy().reshape(-1, DIM)
                part_id = ((block[:, None] - centroids[None]) ** 2).sum(-1).argmin(1).astype("uint32")
                residual = (block - centroids[part_id]).reshape(len(block), M, 1, DIM // M)
                pq_code = ((residual - codebook[None]) ** 2).sum(-1).argmin(-1).astype("uint8")
                codes = pa.FixedSizeListArray.from_arrays(pa.array(pq_code.reshape(-1)), M)
                names = ["_rowid", "__ivf_part_id", "__pq_code"]
                builder.append_batch(pa.record_batch([batch["_rowid"], pa.array(part_id), codes], names))
            builder.finish(rows_dropped=scan.dropped)

        ds = la.finalize(ds, "vector", builder.artifact)
        search = {"column": "vector", "q": vectors[123], "k": 5, "nprobes": K, "refine_factor": 10}
        print(ds.to_table(nearest=search, with_row_id=True)["_rowid"].to_pylist())


if __name__ == "__main__":
    main()
