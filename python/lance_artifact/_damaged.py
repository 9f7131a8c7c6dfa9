"""What lies at a shard whose manifest, or metadata, cannot be read: which of its files are the artifact's is not known, but which are ours."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

from . import _lance_artifact as core
from ._artifacts import MANIFEST

CLAIM = ".lance-artifact-claim"
# Bytes of a claim that is read.
MOST_MARKS = 4096
# Seconds after which an attempt that wrote nothing counts as gone, as for the extension.
ABANDONED_AFTER = 7 * 86400

_PARTITIONS = "partitions"
_TAG = "[0-9a-f]{8}"
# The names that the extension's writer gives (src/artifact/format/layout.rs), claims apart.
_OURS = re.compile(
    rf"(metadata|partitions|partitions/bucket-[0-9]{{5,}})(-{_TAG})?\.lance|"
    rf"(partitions/)?\.lance-artifact-({_TAG}-)?[0-9A-Za-z]{{6}}"
)
_CLAIM = re.compile(rf"{re.escape(CLAIM)}(-{_TAG})?")


@dataclass
class Damaged:
    """What is there.

    Attributes
    ----------
    files : list of str
        In the order in which they may be deleted: claims and the manifest last, by which it is known what the others are.
    is_busy : bool
        An attempt is at work there, or may be.
    """

    files: list[str] = field(default_factory=list)
    is_busy: bool = False


def damaged(place: str, storage_options: Any, unknown_too: bool) -> Damaged:
    """Look at a shard; nothing is changed. Of attempts elsewhere it cannot be known whether they go on: they are over if ``unknown_too``.

    An attempt puts its claim before any file, so that without claims nobody is at work.
    """
    there = core.list_folder(place, "", storage_options)
    if any(name == _PARTITIONS and size is None for name, size, _ in there):
        there += core.list_folder(place, _PARTITIONS, storage_options)
    at = {name: modified for name, size, modified in there if size is not None}
    files = sorted(name for name in at if _OURS.fullmatch(name))
    claims = sorted(name for name in at if _CLAIM.fullmatch(name))
    newest = max((at[name] for name in (*files, *claims)), default=0.0)
    is_old = time.time() - newest > ABANDONED_AFTER
    busy = [claim for claim in claims if _may_go_on(place, claim, storage_options, is_old or unknown_too)]
    return Damaged([*files, *claims, *(name for name in (MANIFEST,) if name in at)], bool(busy))


def _may_go_on(place: str, claim: str, storage_options: Any, unknown_is_over: bool) -> bool:
    content = core.read_file(place, claim, storage_options)
    if content is None:
        # Given up meanwhile.
        return False
    try:
        if len(content) > MOST_MARKS:
            raise ValueError
        owner = json.loads(content)["owner"]
        marks, is_here = json.dumps(owner), owner["host"] == json.loads(core.owner_marks())["host"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return not unknown_is_over
    if core.owner_is_gone(marks):
        return False
    return is_here or not unknown_is_over


def delete_damaged(place: str, files: list[str], storage_options: Any) -> None:
    core.delete_files(place, files[:-1], [_PARTITIONS], storage_options)
    core.delete_files(place, files[-1:], [""], storage_options)
