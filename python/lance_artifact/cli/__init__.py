"""The command `lance-artifact`."""

from __future__ import annotations

import os

# What the statistics of an index hold; said here so that pylance does not warn about its default on every run.
os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")

from . import _build as _build
from . import _life as _life
from . import _look as _look
from ._app import EXIT_CODES, main

__all__ = ["EXIT_CODES", "main"]
