"""What Lance says of an error, without the place in its source, which on another machine is nowhere."""

from __future__ import annotations

import re

_SOURCE = re.compile(r"(, [^\s,]+\.rs:\d+:\d+)+\s*$")


def lance_says(error: BaseException | None) -> str:
    return f"Lance says: {_SOURCE.sub('', str(error))}"
