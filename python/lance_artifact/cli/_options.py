"""Options that several commands have, their types, and hints how to choose."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .. import exceptions as errors
from .._lance_artifact import shown_uri, without_secrets

if TYPE_CHECKING:
    _IntParam = click.ParamType[int]
    _ListParam = click.ParamType[list[int]]
else:
    # Not generic in earlier releases.
    _IntParam = _ListParam = click.ParamType

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


class Bytes(_IntParam):
    """1073741824, 1GiB, 1.5GB, 512M."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(-?[0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?", str(value).strip().upper())
        if found is None or found[2] not in _UNITS:
            self.fail(
                f"got {value!r}, expected a number of bytes such as 1073741824, 1GiB or 512MB", param, ctx
            )
        return (
            int(float(found[1]) * _UNITS[found[2]]) if "." in found[1] else int(found[1]) * _UNITS[found[2]]
        )


class Devices(_ListParam):
    """0 or 0,1."""

    name = "n,n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"got {value!r}, expected device indices such as 0 or 0,1", param, ctx)


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order in which they are shown."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def storage_options(values: tuple[str, ...]) -> dict[str, str] | None:
    if not values:
        return None
    pairs = {}
    for value in values:
        key, sign, text = value.partition("=")
        if not sign:
            raise errors.InvalidInputError(f"--storage-option: got {value!r}, expected KEY=VALUE")
        pairs[key] = text
    return pairs


storage = click.option(
    "--storage-option",
    "storage_option",
    multiple=True,
    metavar="KEY=VALUE",
    help="Of the store, for dataset and artifact, such as aws_region=eu-west-1; repeatable. Credentials are found as by Lance.",
)
memory = click.option(
    "--memory-limit",
    type=Bytes(),
    help="What the command may hold, such as 4GiB. [default: half of what the machine, or its container, has free]",
)
backend = together(
    click.option(
        "--backend",
        default="auto",
        help='"auto": a GPU if there is one, else the CPU. See: lance-artifact backends',
    ),
    click.option("--devices", type=Devices(), help="GPUs that share the rows. [default: the first]"),
    click.option(
        "--device-memory-limit", type=Bytes(), help="Of each GPU, beside CUDA's own. [default: what is free]"
    ),
)
assign = click.option(
    "--assign",
    type=click.Choice(["exact", "fast"]),
    default="exact",
    help="fast, on the CPU: rows meet the nearest groups of centroids only, and at most 1 in 1,000 is not with its nearest centroid.",
)
fragments = click.option(
    "--fragment",
    type=int,
    multiple=True,
    metavar="ID",
    help="Only these fragments; repeatable. [default: all]",
)
shards = click.option(
    "--num-shards",
    type=int,
    metavar="N",
    help="Artifacts of a run: what a worker that dies loses. [default: one for each million rows, 64 at most]",
)
training = together(
    click.option(
        "--metric",
        type=click.Choice(["l2", "euclidean", "cosine", "dot"], case_sensitive=False),
        default="l2",
        help="What searches compare by: that of the model the vectors come from, mostly cosine for texts.",
    ),
    click.option(
        "--num-partitions",
        type=int,
        metavar="K",
        help="Searches read nprobes of K partitions: about rows / 8192, up to the root of the rows times 4. [default: rows / 8192, 4096 at most]",
    ),
    click.option(
        "--num-sub-vectors",
        type=int,
        metavar="M",
        help="A code has M bytes: more finds more and is larger; a divisor of the dimension. [default: dimension / 16, else / 8]",
    ),
    click.option("--num-bits", type=int, default=8, help="Of a sub-vector's code: 8, or 4 for half the size and less recall."),
    click.option(
        "--sample-rate", type=int, default=256, help="Vectors for each centroid and codeword in training; K is at most rows / this."
    ),
    click.option("--max-iters", type=int, default=50, help="Of k-means; it ends earlier where it has converged."),
    click.option("--seed", type=int, default=0, help="The same seed, version and backend give the same model."),
)  # fmt: skip
committing = together(
    click.option(
        "--index-type",
        default="IVF_PQ",
        help="IVF_PQ, or IVF_HNSW_PQ: a graph in each partition, slower to build and faster to search where partitions are large.",
    ),
    click.option("-m", "m", type=int, default=20, help="Of IVF_HNSW_PQ: edges per node."),
    click.option("--ef", "ef_construction", type=int, default=150, help="Of IVF_HNSW_PQ: candidates kept while building."),
    click.option("--max-level", type=int, default=7, help="Of IVF_HNSW_PQ: levels at most."),
    click.option("--name", help="Of the index. [default: COLUMN_idx, or COLUMN_idx_2 and so on]"),
    click.option("--replace", is_flag=True, help="Replace an index of that name."),
)  # fmt: skip


def open_dataset(uri: str, options: dict[str, str] | None) -> Any:
    import lance

    try:
        return lance.dataset(uri, storage_options=options)
    except (ValueError, OSError) as error:
        raise errors.InvalidInputError(
            f"dataset {shown_uri(uri)!r} cannot be opened: {without_secrets(str(error), uri)}"
        ) from error
