"""What the machines of a Ray cluster have room for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ._log import LOGGER
from .exceptions import InvalidInputError

# Options of an actor by which the caller says where it goes.
PLACES = ("scheduling_strategy", "label_selector", "placement_group")


def wanted_of(remote: Mapping[str, Any]) -> dict[str, float]:
    """What each worker needs, by Ray's names."""
    wanted: dict[str, float] = {"GPU": remote.get("num_gpus") or 0, "CPU": remote.get("num_cpus", 1) or 0}
    wanted |= remote.get("resources") or {}
    if remote.get("memory"):
        wanted["memory"] = remote["memory"]
    if remote.get("accelerator_type"):
        # As much as Ray itself takes of it.
        wanted[f"accelerator_type:{remote['accelerator_type']}"] = 0.001
    return {what: each for what, each in wanted.items() if each}


def check_room(
    there: Mapping[str, float],
    nodes: Iterable[Mapping[str, Any]],
    remote: Mapping[str, Any],
    num_workers: int,
) -> None:
    """Refuse at once what would wait for ever: more than the cluster has, or for one worker than any machine of it.

    Where some of them fit, those work, and the others begin when there is room.

    Raises
    ------
    InvalidInputError
    """
    wanted = wanted_of(remote)
    for what, each in wanted.items():
        if each * num_workers > there.get(what, 0):
            raise InvalidInputError(
                f"ray_remote_args: {num_workers} workers of {each} {what} need {each * num_workers}, the cluster has {there.get(what, 0):g}; "
                "lower num_workers"
            )
    room = sum(_rooms(nodes, remote, num_workers))
    if room < num_workers:
        each_of = " and ".join(f"{each} {what}" for what, each in wanted.items())
        if not room:
            raise InvalidInputError(
                f"ray_remote_args: no machine of the cluster has {each_of} for a worker; ask for less"
            )
        LOGGER.warning(
            "of %d workers of %s the machines of the cluster have room for %d at once; the others begin when there is more",
            num_workers,
            each_of,
            room,
        )


def spread(remote: Mapping[str, Any], in_group: bool) -> dict[str, str]:
    """The option of an actor that spreads workers over the machines.

    Ray fills one machine first, whose memory would be counted as if they were spread. But the placement group that the caller runs in,
    ``in_group``, is where its actors go: this option would take them out of what is reserved for them.
    """
    return {} if _placed(remote, in_group) else {"scheduling_strategy": "SPREAD"}


def _placed(remote: Mapping[str, Any], in_group: bool) -> bool:
    """Whether the caller has said where workers go, which may be one machine."""
    return in_group or any(remote.get(option) is not None for option in PLACES)


def most_on_a_node(
    nodes: Iterable[Mapping[str, Any]], remote: Mapping[str, Any], num_workers: int, in_group: bool = False
) -> int:
    """Workers that one machine gets at the most, where they are spread over those that can run any: a head often cannot."""
    rooms = [min(room, num_workers) for room in _rooms(nodes, remote, num_workers)]
    if _placed(remote, in_group):
        return max([1, *rooms])
    for each in range(1, num_workers):
        if sum(min(room, each) for room in rooms) >= num_workers:
            return each
    return num_workers


def _rooms(nodes: Iterable[Mapping[str, Any]], remote: Mapping[str, Any], num_workers: int) -> list[int]:
    """For each machine that can run a worker, how many it has room for; more than are wanted where nothing bounds them."""
    wanted, rooms = wanted_of(remote), []
    for node in nodes:
        has = node["Resources"]
        if not node["Alive"] or any(has.get(what, 0) < each for what, each in wanted.items()):
            continue
        # Ray places an actor that asks for no CPUs by one, and then counts none for it.
        counted = {what: each for what, each in wanted.items() if what != "CPU" or remote.get("num_cpus")}
        # Shares of a device are no exact numbers.
        rooms.append(min([num_workers, *(int(has[what] / each + 1e-6) for what, each in counted.items())]))
    return rooms
