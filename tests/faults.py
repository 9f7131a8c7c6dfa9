"""Every call of the system, or of a store, going wrong in every way that it can, one at a time, in the middle of what users do.

``python tests/faults.py [--store s3] [--scenario merge ...] [--share 0.1] [--seed 7]``: all of them, or a share; ``--schedules 1000``: random
ones, in which several go wrong. A failing try is printed with what makes it happen again; Ctrl-C tells what the tries so far gave.

After each try: what was there before is there and intact, or what should be there is, exactly; an error is of this package's types, and names
the place; the same call then succeeds; and nothing is left over that is not cleaned up.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fault_places import KILL, MODULE, Local, Remote, Step, place
from fault_scenarios import SCENARIOS, of
from worker import Ended, Raised, Stuck

# Seconds until what comes late has come.
LATE = 1.5


@dataclass
class Report:
    tries: int = 0
    #: Of those in which the calls that were to go wrong were not made, or could not go wrong that way.
    missed: int = 0
    #: How a try ended: "old" or "new" is there, and whether there was an error.
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    #: Ctrl-C came before all was tried.
    interrupted: bool = False


class Campaign:
    """Tries of one scenario at one place."""

    def __init__(self, at: Local | Remote, name: str, report: Report, say: Callable[[str], None]) -> None:
        self.at, self.name, self.report, self.say = at, name, report, say
        self.scenario = SCENARIOS[name]
        self.old: Any = None
        self.new: Any = None
        #: How often each kind of call is made when nothing goes wrong.
        self.calls: Counter[str] = Counter()

    def _call(self, function: str, *arguments: Any) -> Any:
        return self.at.worker().call(MODULE, function, *arguments)

    def _sound(self, function: str, *arguments: Any) -> Any:
        answer = self._call(function, *arguments)
        if isinstance(answer, Raised):
            raise AssertionError(f"{function}: {answer.name}: {answer.message}\n{answer.trace}")
        return answer

    def prepare(self) -> None:
        self.at.empty()
        self._sound("prepare", self.name, self.at.place)
        self.at.keep()
        self.old = self._sound("state", self.name, self.at.place)
        self._sound("ready", self.name, self.at.place)
        self.at.armed.arm([])
        self._sound("call")
        self.at.armed.disarm()
        self.calls = self.at.armed.counts
        self.new = self._sound("state", self.name, self.at.place)
        assert self.scenario.only_reads == (self.old == self.new), f"{self.name}: the call changes nothing"
        self.kept = self.at.tree()
        # The same call on the same state gives the same.
        self.at.restore()
        self._sound("ready", self.name, self.at.place)
        self._sound("call")
        assert self._sound("state", self.name, self.at.place) == self.new, (
            f"{self.name}: the call gives different results"
        )

    def every(self) -> list[list[Step]]:
        """Each call in each way."""
        return [
            [Step(kind, number, how)]
            for kind, count in sorted(self.calls.items())
            for number in range(count)
            for how in self.at.kinds.get(kind, [])
        ]

    def kills(self) -> list[list[Step]]:
        return [
            [Step(kind, number, KILL)]
            for kind, count in sorted(self.calls.items())
            for number in range(count)
        ]

    def schedule(self, rng: random.Random) -> list[Step]:
        """Two to five calls go wrong."""
        kinds = [kind for kind in self.calls if kind in self.at.kinds]
        steps = []
        for _ in range(rng.randint(2, 5)):
            kind = rng.choice(kinds)
            steps.append(Step(kind, rng.randrange(self.calls[kind]), rng.choice(self.at.kinds[kind])))
        return steps

    def attempt(self, steps: list[Step], forever: bool = False) -> None:
        shown = f"--scenario {self.name} --steps {' '.join(map(str, steps))}{' --forever' if forever else ''}"
        try:
            problem = self._attempt(steps, forever)
        except Stuck as error:
            problem = f"a call that does not end: {error}"
            self.at.end()
        except (AssertionError, Ended) as error:
            problem = f"{type(error).__name__}: {error}"
            self.at.end()
        if problem:
            happened = "\n      ".join(self.at.armed.happened)
            self.report.wrong.append(f"{shown}\n      {happened}\n    {problem}")
            self.say(f"WRONG {self.report.wrong[-1]}")

    def _attempt(self, steps: list[Step], forever: bool) -> str:
        report, armed = self.report, self.at.armed
        self.at.restore()
        self._sound("ready", self.name, self.at.place)
        armed.arm(steps, forever)
        started = time.monotonic()
        try:
            answer = self._call("call")
        except Ended:
            answer = None
            self.at.end()
            if not any(step.how == KILL for step in steps):
                return "the process ended by itself"
        took = time.monotonic() - started
        armed.disarm()
        if any(step.how == "late" for step in steps):
            time.sleep(LATE)
        report.tries += 1
        if not armed.happened:
            report.missed += 1
        for step in steps:
            report.kinds[f"{step.kind} {str(step).split(':', 2)[2]}"] += 1
        killed = answer is None and self.at._worker is None
        ended = "killed" if killed else "error" if isinstance(answer, Raised) else "done"
        if isinstance(answer, Raised):
            if "AssertionError" in answer.bases:
                return f"a wrong answer: {answer.message}"
            report.errors[answer.name] += 1
            if "LanceArtifactError" not in answer.bases:
                return f"an error of another's type: {answer.name}: {answer.message}\n{answer.trace}"
            if answer.name == "CorruptArtifactError":
                return f"a disk, a store or a network that fails is said to be damage: {answer.message}"
            if "panick" in answer.message.lower():
                return f"a panic: {answer.message}"
            if not any(name in answer.message for name in self._names()):
                return f"an error that does not name the place where it was: {answer.name}: {answer.message}"
        there = self._sound("state", self.name, self.at.place)
        which = "new" if there == self.new else "old" if there == self.old else "neither"
        report.outcomes[f"{ended}, {which}"] += 1
        if which == "neither":
            return f"{ended}, and what is there is neither what was nor what should be: {_short(there)}; answer {answer}"
        if ended == "done" and which != "new":
            return "it says that it is done, and it is not"
        if took > 60:
            return f"it took {took:.0f} s"
        if ended != "done" or self.scenario.only_reads:
            # As users do: the same call again, or, where that would find it done, the one that does it anew.
            self._sound("again" if which == "new" else "ready", self.name, self.at.place)
            self._sound("call")
            if self._sound("state", self.name, self.at.place) != self.new:
                return "the same call, again, gives something else"
        self._sound("clean", self.name, self.at.place)
        # Whoever cleans up may fail too: then files stay whose names say what they are (docs/FORMAT.md), which those who come later remove.
        late = any(step.how == "late" for step in steps)
        # Where several go wrong, one may be of the cleaning up. Of a file that was made and denied, or when nobody waited for it any more,
        # nobody knows.
        denied = len(steps) > 1 or any(
            step.how == "late" or (str(step).endswith(":done:EIO") and step.kind == "create")
            for step in steps
        )
        left = [name for name in self._left() if not ((denied or ended == "done") and _known(name))]
        if len(steps) > 1:
            # With its owner's mark, by which the next build knows it.
            left = [name for name in left if not name.startswith("ds/_indices/")]
        if any(step.kind in ("BEGIN", "ABORT") for step in steps):
            # Of an upload of which the client heard nothing only the store knows: its rules end it.
            left = [name for name in left if not name.startswith("upload of ")]
        if isinstance(answer, Raised) and "the files of the segment stay" in answer.message:
            # A commit that nobody answered may still come, and its files are needed then.
            late = True
        if late:
            # Lance's own cleanup removes what no version names.
            left = [name for name in left if not name.startswith("ds/_indices/")]
        if killed:
            # The rerun is of another process, which takes only what it needs for its own.
            left = [name for name in left if not _known(name) and not name.startswith("ds/_indices/")]
            if which == "new":
                # Where nothing is to be done, no folder is made, and none of the dead is looked for.
                left = [name for name in left if not name.startswith("temporary/")]
        if left:
            report.left[f"{', '.join(sorted({_kind_of_file(name) for name in left}))}"] += 1
            return f"{ended}; left over: {left}; answer {answer}"
        return ""

    def _names(self) -> list[str]:
        """Of the dataset, the artifact or the run of which a call went wrong."""
        base = self.at.place.base
        places = [f"/{place}" if place else "" for place in self.at.armed.places] or [""]
        return [f"{name}{place}" for name in (base, base.removeprefix("s3://")) for place in places]

    def _left(self) -> list[str]:
        """Files that are not there after a call in which nothing went wrong."""
        there, kept = Counter(map(_plain, self.at.tree())), Counter(map(_plain, self.kept))
        return sorted(name for name in (there - kept).elements() if name)


def _plain(name: str) -> str:
    """A file's name without what is drawn at random in it. How many versions there are is not looked at."""
    if re.match(r"ds/(data|_versions|_transactions|_deletions)/", name):
        return ""
    name = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "UUID", name)
    # Where the plain name was taken.
    return re.sub(r"-[0-9a-f]{8}(?=\.lance|$)", "", name)


def _known(name: str) -> bool:
    """Whether it is a name of the format, of what is no part of an artifact any more."""
    return bool(
        re.fullmatch(
            r"(run/shards/\d+|artifact)/((partitions/)?\.lance-artifact-.*|partitions/bucket-\d+\.lance|metadata\.lance)|run/\.lance-artifact-\w+",
            name,
        )
    )


def _kind_of_file(name: str) -> str:
    return name.rsplit("/", 1)[-1][:40]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 300 else f"{text[:300]}..."


def run(
    store: str,
    scenarios: list[str],
    share: float = 1.0,
    seed: int = 0,
    kills: int = 0,
    schedules: int = 0,
    part: tuple[int, int] = (1, 1),
    say: Callable[[str], None] = print,
) -> Report:
    """Try a share of all faults, `kills` instants of a killed process for each scenario, and `schedules` random ones; of the faults
    one of `part[1]` parts, so that several processes can share them."""
    rng, report = random.Random(seed), Report()
    with place(store) as at:
        try:
            for name in scenarios:
                campaign = Campaign(at, name, report, say)
                campaign.prepare()
                tries = campaign.every()
                chosen = [steps for steps in tries if rng.random() < share][part[0] - 1 :: part[1]]
                for steps in chosen:
                    campaign.attempt(steps)
                instants = min(kills, sum(campaign.calls.values())) if store == "local" else 0
                for kill in rng.sample(campaign.kills(), instants) if instants else []:
                    campaign.attempt(kill)
                for _ in range(schedules):
                    campaign.attempt(campaign.schedule(rng))
                say(
                    f"{store} {name}: {sum(campaign.calls.values())} calls, {len(chosen)} of {len(tries)} faults"
                )
                at.end()
        except KeyboardInterrupt:
            report.interrupted = True
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", choices=["local", "s3"], default="local")
    parser.add_argument("--scenario", nargs="*", choices=list(SCENARIOS), default=[])
    parser.add_argument("--share", type=float, default=1.0, help="of all faults, the share that is tried")
    parser.add_argument("--part", default="1/1", help="of the faults, this one of so many parts: 2/3")
    parser.add_argument("--kills", type=int, default=0, help="for each scenario")
    parser.add_argument("--schedules", type=int, default=0, help="random ones for each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", nargs="*", help="just this try")
    parser.add_argument(
        "--forever", action="store_true", help="from the first step on, all calls of the kind go wrong"
    )
    args = parser.parse_args()
    # Also where the shell that put this into the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args.scenario = args.scenario or of(args.store)
    if args.kills and args.store != "local":
        parser.error("--kills: processes are killed at calls of the system, on disks alone")
    part, _, parts = args.part.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        parser.error(f"--part: expected I/N with 1 <= I <= N, got {args.part!r}")
    if args.steps:
        report = Report()
        with place(args.store) as at:
            campaign = Campaign(at, args.scenario[0], report, print)
            campaign.prepare()
            campaign.attempt([Step.parse(text) for text in args.steps], args.forever)
    else:
        report = run(
            args.store,
            args.scenario,
            args.share,
            args.seed,
            args.kills,
            args.schedules,
            (int(part), int(parts)),
        )
    shown = {
        "store": args.store, "tries": report.tries - report.missed, "missed": report.missed, "outcomes": dict(report.outcomes),
        "errors": dict(report.errors), "wrong": len(report.wrong), "left": dict(report.left),
        **({"interrupted": True} if report.interrupted else {}),
    }  # fmt: skip
    print(json.dumps(shown, indent=1))
    return 1 if report.wrong else 130 if report.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
