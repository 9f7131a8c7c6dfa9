"""A function of ours over one of pylance's or LanceDB's, which other calls do not notice."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ._pylance import put_over

# What warns with stacklevel=2 means the line that called it, and Python shows deprecations only of the program's own lines. So `warnings`
# must count the frame of ours between the two as none. It leaves out, in every release of Python that is supported, the frames of files
# with "importlib" and "_bootstrap" in their names; of other ways, `skip_file_prefixes` is for who warns, and to catch and repeat what was
# said changes the filters of all threads.
_LEFT_OUT = f"<{__file__}, which warnings leave out as they do importlib._bootstrap>"


def over(original: Any, ours: Callable[..., Callable[[], Any] | None]) -> Any:
    """``original``, but for calls of which ``ours`` makes another one, or raises.

    A coroutine function is one afterwards too, and then that other call is awaited.
    """
    call: Any
    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            other = ours(*args, **kwargs)
            return await (original(*args, **kwargs) if other is None else other())

        call = call_async
    else:

        @functools.wraps(original)
        def call_now(*args: Any, **kwargs: Any) -> Any:
            other = ours(*args, **kwargs)
            return original(*args, **kwargs) if other is None else other()

        call = call_now
    call.__code__ = call.__code__.replace(co_filename=_LEFT_OUT)
    return put_over(original, call)
