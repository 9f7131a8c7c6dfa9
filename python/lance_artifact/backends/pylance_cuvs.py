"""The external `lance_cuvs` loader. This version looks for it and says what is missing."""

from __future__ import annotations

from importlib.util import find_spec

from . import _cuda
from ._protocol import Availability
from .cuvs import NOT_YET, CuvsBackend


class PylanceCuvsBackend(CuvsBackend):
    """Probes for the `lance_cuvs` package, the NVIDIA driver and a device."""

    name = "pylance-cuvs"

    def availability(self) -> Availability:
        """Which of package, driver and device is missing. Imports nothing of CUDA."""
        missing = []
        if find_spec("lance_cuvs") is None:
            missing.append(
                "package: the Python package lance_cuvs is not installed; pip install pylance-cuvs"
            )
        cuda = _cuda.probe()
        return Availability(False, (*missing, *_cuda.missing(cuda), NOT_YET), {"devices": cuda.devices})
