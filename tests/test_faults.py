"""Faults, kills and crashes in the middle of what users do: a share of what ``scripts/proof`` tries."""

from __future__ import annotations

import copy
import errno
import os
import random
from pathlib import Path

import pytest

import crashes
import faults
import syscalls
from fault_scenarios import SCENARIOS, of
from syscalls import Call, Fault, Watched
from worker import Ended, Raised

watched = pytest.mark.skipif(bool(syscalls.supported()), reason=syscalls.supported())


# What a worker does, for the tests of the tests.


def write(path: str, sync: bool) -> None:
    """A file that appears in one step."""
    with open(f"{path}/new", "wb") as file:
        for part in range(4):
            file.write(bytes([part]) * 4096)
            file.flush()
        if sync:
            os.fsync(file.fileno())
    os.rename(f"{path}/new", f"{path}/file")
    if sync:
        folder = os.open(path, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def read(path: str) -> bytes:
    return Path(path).read_bytes()


CONTENT = b"".join(bytes([part]) * 4096 for part in range(4))


@watched
def test_a_call_of_the_system_goes_wrong(tmp_path: Path) -> None:
    seen: list[Call] = []
    wrong: dict[tuple[str, int], Fault] = {}

    def policy(call: Call) -> Fault | None:
        seen.append(call)
        return wrong.get((call.kind, sum(c.kind == call.kind for c in seen) - 1))

    with Watched(tmp_path, ["test_faults"]) as worker:
        worker.policy = policy
        assert worker.call("test_faults", "write", str(tmp_path), True) is None
        kinds = [call.kind for call in seen if call.kind not in ("stat", "read")]
        assert kinds == ["create", *["write"] * 4, "sync", "rename", "open", "sync"]
        assert (seen[-3].path, seen[-3].to) == ("new", "file")
        for step, fault, code in (
            (("write", 2), Fault("error", errno.ENOSPC), errno.ENOSPC),
            (("sync", 0), Fault("error", errno.EIO), errno.EIO),
            (("rename", 0), Fault("done", errno.ENOENT), errno.ENOENT),
        ):
            seen.clear()
            (tmp_path / "file").unlink(missing_ok=True)
            wrong = {step: fault}
            answer = worker.call("test_faults", "write", str(tmp_path), True)
            assert isinstance(answer, Raised) and f"[Errno {code}]" in answer.message
            assert (tmp_path / "file").exists() == (fault.how == "done")
        # Half of a write is not lost: whoever writes goes on with the rest.
        seen.clear()
        wrong = {("write", 1): Fault("short")}
        assert worker.call("test_faults", "write", str(tmp_path), True) is None
        assert (tmp_path / "file").read_bytes() == CONTENT
        seen.clear()
        wrong = {("read", 0): Fault("short")}
        assert worker.call("test_faults", "read", str(tmp_path / "file")) == CONTENT
        seen.clear()
        wrong = {("rename", 0): Fault("kill")}
        (tmp_path / "file").unlink()
        with pytest.raises(Ended):
            worker.call("test_faults", "write", str(tmp_path), True)
        assert (tmp_path / "new").read_bytes() == CONTENT and not (tmp_path / "file").exists()


@watched
@pytest.mark.parametrize("sync", [True, False])
def test_what_a_crash_leaves(sync: bool, tmp_path: Path) -> None:
    calls: list[Call] = []
    with Watched(tmp_path, ["test_faults"], record=True) as worker:
        before = crashes.Disk(tmp_path)
        worker.policy = lambda call: calls.append(call) if call.kind in crashes.CHANGES else None
        worker.call("test_faults", "write", str(tmp_path), sync)
    found = set()
    for moment in range(len(calls) + 1):
        for seed in range(60):
            disk = copy.deepcopy(before)
            for call in calls[:moment]:
                disk.apply(call)
            left = disk.after_a_crash(random.Random(seed), lambda path: False)
            content = left.get("file", b"none") or b""
            found.add("none" if content == b"none" else "whole" if content == CONTENT else "torn")
            if sync and moment == len(calls):
                assert left == {"file": CONTENT}
    # Without waiting for the disk, a name may be there before what it names.
    assert found == ({"none", "whole"} if sync else {"none", "whole", "torn"})


def _tried(store: str, name: str, tries: int, kills: int) -> None:
    found: list[str] = []
    with faults.place(store) as at:
        report = faults.Report()
        campaign = faults.Campaign(at, name, report, found.append)
        campaign.prepare()
        rng = random.Random(name)
        every = campaign.every()
        for steps in rng.sample(every, min(tries, len(every))):
            campaign.attempt(steps)
        for steps in rng.sample(campaign.kills(), kills):
            campaign.attempt(steps)
        for _ in range(tries // 4):
            campaign.attempt(campaign.schedule(rng))
    assert not report.wrong, "\n".join(report.wrong)
    assert report.tries >= tries and report.missed < report.tries / 2


@watched
@pytest.mark.parametrize("name", of("local"))
def test_calls_that_go_wrong(name: str) -> None:
    _tried("local", name, 8, 0 if SCENARIOS[name].only_reads else 2)


@pytest.mark.parametrize("name", of("s3"))
def test_requests_that_go_wrong(name: str) -> None:
    _tried("s3", name, 5, 0)


@watched
@pytest.mark.parametrize("name", of("local", changing=True))
def test_machines_that_stop(name: str) -> None:
    found: list[str] = []
    report = crashes.run([name], 24, 0, found.append)
    assert not report.wrong, "\n".join(report.wrong)
    assert report.states == 24
