"""The model of a committed index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from . import _lance_artifact as core
from ._checked import checked
from ._dataset import Handle

if TYPE_CHECKING:
    import lance


@checked
def model_of_index(dataset: lance.LanceDataset | str | Path, name: str) -> core.IvfPqModel:
    """See `IvfPqModel.from_index`."""
    return core.model_of_index(Handle.of(dataset).core, name)
