"""Pictures that commands draw."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import exceptions as errors


def check_plot(path: Path) -> None:
    """Everything that drawing could fail on is known before anything is read."""
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


def plot_sizes(sizes: Any, path: Path) -> None:
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
