"""What is on a disk after a machine stopped, at any moment of a call: only what was synced is sure to be there.

``python tests/crashes.py [--scenario write ...] [--states 1000] [--seed 7]``. A call is recorded once. From the record disks are made as they may
be after a crash at any of its moments: of what was written since the last sync of a file, each piece is there, or is not, or is torn; of
the names that came and went since the last sync of a folder, the first few are there, or any of them. Then what is there is looked at.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fault_scenarios import SCENARIOS, Place, of
from syscalls import Call, Watched
from worker import Raised, Worker

MODULE = "fault_scenarios"
SECTOR = 512
CHANGES = ("create", "open", "write", "truncate", "sync", "mkdir", "rmdir", "rename", "link", "unlink")


@dataclass
class File:
    synced: bytes = b""
    #: Since the last sync: (offset, what was written there), or (length, None) for a file that was cut or grown.
    since: list[tuple[int, bytes | None]] = field(default_factory=list)

    def content(self) -> bytes:
        return _applied(self.synced, self.since)


@dataclass
class Folder:
    synced: dict[str, File | Folder] = field(default_factory=dict)
    #: Since the last sync: names that came (with what they name) or went; a rename within the folder is one change.
    since: list[dict[str, File | Folder | None]] = field(default_factory=list)

    def entries(self) -> dict[str, File | Folder]:
        return _named(self.synced, self.since)


def _below(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _applied(content: bytes, changes: list[tuple[int, bytes | None]]) -> bytes:
    made = bytearray(content)
    for offset, data in changes:
        length = offset if data is None else offset + len(data)
        if length > len(made):
            made.extend(bytes(length - len(made)))
        if data is None:
            del made[offset:]
        else:
            made[offset : offset + len(data)] = data
    return bytes(made)


def _named(
    names: dict[str, File | Folder], changes: list[dict[str, File | Folder | None]]
) -> dict[str, File | Folder]:
    made = dict(names)
    for change in changes:
        for name, what in change.items():
            if what is None:
                made.pop(name, None)
            else:
                made[name] = what
    return made


class Disk:
    """What a system knows of a folder, and what of it is surely on the disk."""

    def __init__(self, root: Path) -> None:
        self.root = self._read(root)

    def _read(self, folder: Path) -> Folder:
        # What was there before is taken as synced.
        return Folder(
            {
                entry.name: self._read(entry) if entry.is_dir() else File(entry.read_bytes())
                for entry in folder.iterdir()
            }
        )

    def find(self, path: str) -> File | Folder | None:
        at: File | Folder | None = self.root
        for name in path.split("/") if path else []:
            at = at.entries().get(name) if isinstance(at, Folder) else None
        return at

    def _parent(self, path: str) -> tuple[Folder | None, str]:
        folder, _, name = path.rpartition("/")
        found = self.find(folder)
        return (found if isinstance(found, Folder) else None), name

    def apply(self, call: Call) -> None:
        """A call as it was made; one that must have failed changes nothing."""
        if call.path.endswith(" (deleted)"):
            return
        found = self.find(call.path)
        parent, name = self._parent(call.path)
        if call.kind in ("create", "open"):
            if found is None and call.kind == "create" and parent is not None:
                parent.since.append({name: File()})
            elif isinstance(found, File) and call.flags & os.O_TRUNC and not call.flags & os.O_EXCL:
                found.since.append((0, None))
        elif call.kind == "write" and isinstance(found, File):
            found.since.append((call.offset, call.data))
        elif call.kind == "truncate" and isinstance(found, File):
            found.since.append((call.offset, None))
        elif call.kind == "sync" and isinstance(found, File):
            found.synced, found.since = found.content(), []
        elif call.kind == "sync" and isinstance(found, Folder):
            found.synced, found.since = found.entries(), []
        elif call.kind == "mkdir" and found is None and parent is not None:
            parent.since.append({name: Folder()})
        elif (call.kind == "unlink" and isinstance(found, File) and parent is not None) or (
            call.kind == "rmdir" and isinstance(found, Folder) and not found.entries() and parent is not None
        ):
            parent.since.append({name: None})
        elif call.kind in ("rename", "link") and found is not None and parent is not None:
            self._named_anew(call, found, parent, name)

    def _named_anew(self, call: Call, found: File | Folder, parent: Folder, name: str) -> None:
        to, new = self._parent(call.to)
        if to is None or (self.find(call.to) is not None and (call.kind == "link" or not call.replaces)):
            return
        if call.kind == "link":
            to.since.append({new: found})
        elif to is parent:
            parent.since.append({name: None, new: found})
        else:
            to.since.append({new: found})
            parent.since.append({name: None})

    def after_a_crash(self, rng: random.Random, kept: Callable[[str], bool]) -> dict[str, bytes | None]:
        """Files and folders (None) as they may be then. Of paths that `kept` names nothing is lost."""
        mode = rng.choice(["first", "any", "names", "data", "nothing"])
        return dict(self._after(self.root, "", rng, mode, kept))

    def _after(
        self, folder: Folder, path: str, rng: random.Random, mode: str, kept: Callable[[str], bool]
    ) -> Iterator[tuple[str, bytes | None]]:
        lost = [change for change in folder.since if not all(kept(_below(path, name)) for name in change)]
        if mode in ("first", "data"):
            lost = lost[rng.randint(0, len(lost)) :]
        elif mode == "any":
            lost = [change for change in lost if rng.random() < 0.5]
        elif mode == "names":
            lost = []
        gone = set(map(id, lost))
        changes = [change for change in folder.since if id(change) not in gone]
        for name, what in _named(folder.synced, changes).items():
            below = _below(path, name)
            if isinstance(what, Folder):
                yield below, None
                yield from self._after(what, below, rng, mode, kept)
            elif kept(below) or mode == "data":
                yield below, what.content()
            else:
                yield below, _applied(what.synced, list(_survivors(what.since, rng, mode)))


def _survivors(
    changes: list[tuple[int, bytes | None]], rng: random.Random, mode: str
) -> Iterator[tuple[int, bytes | None]]:
    if mode in ("names", "nothing"):
        return
    for offset, data in changes:
        fate = rng.choice(["there", "gone", "torn"])
        if fate == "there" or (fate == "torn" and data is None):
            yield offset, data
        elif fate == "torn" and data is not None:
            yield offset, data[: rng.randint(0, len(data) // SECTOR) * SECTOR]


@dataclass
class Recorded:
    """A call: what it asked of the system, the disk before it, and what was there before and after it."""

    name: str
    folder: Path
    calls: list[Call]
    before: Disk
    old: Any
    new: Any


def record(folder: Path, name: str) -> Recorded:
    place = Place(str(folder))
    calls: list[Call] = []

    def note(call: Call) -> None:
        if call.kind in CHANGES:
            calls.append(call)

    with Watched(folder, [MODULE], record=True) as worker:
        asked = partial(_asked, worker)
        asked("prepare", name, place)
        old = asked("state", name, place)
        before = Disk(folder)
        asked("ready", name, place)
        worker.policy = note
        asked("call")
        worker.policy = None
        new = asked("state", name, place)
    # The record is complete: it makes the disk that there is.
    replayed = copy.deepcopy(before)
    for call in calls:
        replayed.apply(call)
    assert _tree(replayed.root) == _tree(Disk(folder).root), "what was recorded is not what happened"
    return Recorded(name, folder, calls, before, old, new)


def _asked(worker: Worker, function: str, *arguments: Any) -> Any:
    answer = worker.call(MODULE, function, *arguments)
    assert not isinstance(answer, Raised), f"{function}: {answer.message}\n{answer.trace}"
    return answer


def _tree(folder: Folder, path: str = "") -> dict[str, bytes | None]:
    found: dict[str, bytes | None] = {}
    for name, what in folder.entries().items():
        below = f"{path}/{name}"
        found[below] = None if isinstance(what, Folder) else what.content()
        if isinstance(what, Folder):
            found.update(_tree(what, below))
    return found


# Lance's own files of a dataset, which it never waits for: they are taken as kept. Promised is what they name.
def _lances_own(path: str) -> bool:
    return path.startswith("ds/") and not path.startswith("ds/_indices")


@dataclass
class Report:
    states: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Look:
    """At disks after a crash, each laid out where the call was recorded."""

    def __init__(self, was: Recorded, report: Report, say: Callable[[str], None]) -> None:
        self.was, self.report, self.say = was, report, say
        self.place = Place(str(was.folder))
        self.durable = SCENARIOS[was.name].durable

    def at(self, moment: int, seed: int, worker: Worker) -> None:
        """A crash after the first `moment` calls."""
        disk = copy.deepcopy(self.was.before)
        for call in self.was.calls[:moment]:
            disk.apply(call)
        self._lay_out(disk.after_a_crash(random.Random(seed), _lances_own))
        self.report.states += 1
        problem = self._look(moment, worker)
        if problem:
            shown = f"--scenario {self.was.name} --moment {moment} of {len(self.was.calls)} --seed {seed}: {problem}"
            self.report.wrong.append(shown)
            self.say(f"WRONG {shown}")

    def _lay_out(self, files: dict[str, bytes | None]) -> None:
        shutil.rmtree(self.was.folder)
        self.was.folder.mkdir()
        for path, content in files.items():
            at = self.was.folder / path
            if content is None:
                at.mkdir()
            else:
                at.write_bytes(content)

    def _look(self, moment: int, worker: Worker) -> str:
        there = worker.call(MODULE, "state", self.was.name, self.place)
        returned = moment == len(self.was.calls)
        if isinstance(there, Raised):
            self.report.outcomes[f"known to be damaged ({there.name})"] += 1
            if self.durable:
                return f"what is there is damaged: {there.message}"
            # Of a torn manifest nobody can tell whose it is: it is refused, and the refusal says that it is to be removed.
            (self.was.folder / "artifact" / "manifest.json").unlink()
        else:
            which = "new" if there == self.was.new else "old" if there == self.was.old else "neither"
            self.report.outcomes[f"{'after' if returned else 'during'} the call: {which}"] += 1
            if which == "neither":
                return f"what is there is neither what was nor what should be, and passes for sound: {there!r:.300}"
            if self.durable and returned and which != "new":
                return "the call had returned, and what it made is gone"
            if which == "new":
                return ""
        worker.call(MODULE, "clean", self.was.name, self.place)
        answer: Any = None
        for function, arguments in (("again", (self.was.name, self.place)), ("call", ())):
            answer = worker.call(MODULE, function, *arguments)
            if isinstance(answer, Raised):
                return f"the same call fails since: {answer.name}: {answer.message}"
        if worker.call(MODULE, "state", self.was.name, self.place) != self.was.new:
            return "the same call, again, gives something else"
        return ""


def run(names: list[str], states: int, seed: int, say: Callable[[str], None] = print) -> Report:
    """For each scenario so many disks, half of them after the call had returned or in its last tenth, where things are published."""
    report, rng = Report(), random.Random(seed)
    for name in names:
        with tempfile.TemporaryDirectory(prefix="crashes-") as folder:
            was = record(_made(Path(folder) / "place"), name)
            look = Look(was, report, say)
            with Worker([MODULE]) as worker:
                for number in range(states):
                    end = len(was.calls)
                    first = (0, 0, end * 9 // 10, end)[number % 4]
                    look.at(rng.randint(first, end), rng.randrange(1 << 30), worker)
        say(f"{name}: {len(was.calls)} calls, {states} disks")
    return report


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    durable = of("local", changing=True)
    parser.add_argument("--scenario", nargs="*", choices=durable, default=durable)
    parser.add_argument("--states", type=int, default=1000, help="for each scenario")
    parser.add_argument("--moment", type=int, help="just this one, with --seed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.moment is not None:
        report = Report()
        with tempfile.TemporaryDirectory(prefix="crashes-") as folder, Worker([MODULE]) as worker:
            Look(record(_made(Path(folder) / "place"), args.scenario[0]), report, print).at(
                args.moment, args.seed, worker
            )
    else:
        report = run(args.scenario, args.states, args.seed)
    print(
        json.dumps(
            {"states": report.states, "outcomes": dict(report.outcomes), "wrong": len(report.wrong)}, indent=1
        )
    )
    return int(bool(report.wrong))


if __name__ == "__main__":
    sys.exit(main())
