"""Calls of the public functions, which the end of the interpreter waits for: they clean up after themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ._lance_artifact import _Call

P = ParamSpec("P")
R = TypeVar("R")


def awaited(function: Callable[P, R]) -> Callable[P, R]:
    """A thread in such a call, when the interpreter exits, is cancelled and gets some seconds to remove what it wrote."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _Call():
            return function(*args, **kwargs)

    return call
