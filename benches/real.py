"""Real vectors, made of what a development machine has: photographs' patches, and lines of source code."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

import quality

LINES, LEAST_LENGTH, COMPONENTS, FITTED = 1_050_000, 30, 128, 150_000


def patches() -> np.ndarray:
    """Every 8x8 patch of the demo's photographs, in random order: (542,022, 192) float32."""
    from lance_artifact import demo

    found = np.concatenate([demo._patches(image) for image in demo._photographs()])
    np.random.default_rng(1).shuffle(found)
    return found


def text() -> np.ndarray:
    """Lines of the Python sources that are installed here, by their letters: TF-IDF of three to five, 128 singular vectors, of unit length.

    At most 1,050,000, in random order, each line once.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    lines: set[str] = set()
    for folder in (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"]):
        for path in sorted(Path(folder).rglob("*.py")):
            try:
                stripped = (line.strip() for line in path.read_text(errors="ignore").splitlines())
            except OSError:
                continue
            lines.update(line for line in stripped if len(line) > LEAST_LENGTH)
    ordered = sorted(lines)
    rng = np.random.default_rng(1)
    chosen = [ordered[i] for i in rng.permutation(len(ordered))[:LINES]]
    counts = HashingVectorizer(
        analyzer="char_wb", ngram_range=(3, 5), n_features=2**18, norm=None, alternate_sign=False, dtype=np.float32
    ).transform(chosen)  # fmt: skip
    counts.data = 1 + np.log(counts.data)
    weighted = TfidfTransformer(norm="l2").fit_transform(counts).astype(np.float32)
    svd = TruncatedSVD(COMPONENTS, random_state=0, n_iter=2).fit(weighted[:FITTED])
    found = svd.transform(weighted).astype(np.float32)
    return quality.unit(found)


SETS: dict[str, Callable[[], np.ndarray]] = {"patches": patches, "text": text}

if __name__ == "__main__":
    for name in sys.argv[1:] or SETS:
        print(name, SETS[name]().shape)
