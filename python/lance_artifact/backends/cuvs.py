"""NVIDIA cuVS. This version looks for it and says what is missing; encoding with it is not part of this version."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any, NoReturn

from ..exceptions import BackendUnavailableError
from . import _cuda
from ._protocol import Availability

NOT_YET = "support: this version of lance-artifact does not encode with it yet; use backend='cpu'"


class CuvsBackend:
    """Probes for the `cuvs` package, the NVIDIA driver and a device."""

    name = "cuvs"

    def availability(self) -> Availability:
        """Which of package, driver and device is missing. Imports nothing of CUDA."""
        missing = []
        if not sys.platform.startswith("linux"):
            missing.append(f"platform: cuVS needs Linux, this is {sys.platform}")
        if find_spec("cuvs") is None:
            missing.append(
                "package: the Python package cuvs is not installed; pip install cuvs-cu12 (CUDA 12) or cuvs-cu13 (CUDA 13)"
            )
        cuda = _cuda.probe()
        missing += _cuda.missing(cuda)
        details = {"cuda_driver": cuda.driver and ".".join(map(str, cuda.driver)), "devices": cuda.devices}
        return Availability(False, (*missing, NOT_YET), details)

    def train(self, *_: Any, **__: Any) -> NoReturn:
        """Raises BackendUnavailableError with what is missing."""
        self._refuse()

    def encoder(self, *_: Any) -> NoReturn:
        """Raises BackendUnavailableError with what is missing."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise BackendUnavailableError(
            f"backend {self.name!r} cannot run here: " + "; ".join(self.availability().missing)
        )
