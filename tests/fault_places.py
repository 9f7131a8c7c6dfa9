"""Where calls go wrong: a folder of this machine, and a bucket of an S3 server, each with a worker that uses it."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from failing_s3 import proxy
from fault_scenarios import Place
from local_s3 import BUCKET, client, s3_server
from syscalls import Call, Fault, Watched
from worker import Worker

MODULE = "fault_scenarios"

# Seconds until what comes late happens.
LATE = Fault("late", seconds=0.3)

# What a call of the system can do instead of what it should.
LOCAL: dict[str, list[Fault]] = {
    "open": [Fault("error", errno.EIO), Fault("error", errno.EMFILE), LATE],
    "create": [Fault("error", errno.ENOSPC), Fault("error", errno.EIO), Fault("done", errno.EIO), LATE],
    "read": [Fault("error", errno.EIO), Fault("short"), LATE],
    "write": [Fault("error", errno.ENOSPC), Fault("error", errno.EIO), Fault("short"), LATE],
    "truncate": [Fault("error", errno.EIO)],
    "sync": [Fault("error", errno.EIO), LATE],
    "stat": [Fault("error", errno.EIO)],
    "list": [Fault("error", errno.EIO)],
    "lock": [Fault("error", errno.ENOLCK), Fault("error", errno.EIO), LATE],
    "mkdir": [Fault("error", errno.ENOSPC), Fault("done", errno.EEXIST)],
    "rmdir": [Fault("error", errno.EIO)],
    # A network disk whose answer was lost asks again, and hears that it is done already.
    "rename": [Fault("error", errno.EIO), Fault("done", errno.EIO), Fault("done", errno.ENOENT), LATE],
    "link": [Fault("error", errno.EIO), Fault("done", errno.EIO), Fault("done", errno.EEXIST), LATE],
    "unlink": [Fault("error", errno.EIO), Fault("done", errno.ENOENT), LATE],
}
KILL = Fault("kill")

# What a request can do.
REMOTE: dict[str, list[str]] = {
    "GET": ["500", "503", "403", "short", "drop", "hang", "slow"],
    "HEAD": ["500", "403", "drop"],
    "LIST": ["500", "503", "drop", "short"],
    "PUT": ["500", "503", "403", "lost", "heard", "twice", "late", "cut"],
    "PUT-if": ["500", "503", "403", "lost", "heard", "twice", "412", "late", "cut", "hang"],
    "PART": ["500", "503", "lost", "twice", "cut", "late"],
    "BEGIN": ["500", "503", "lost", "heard"],
    "COMPLETE": ["500", "503", "lost", "heard", "twice"],
    "ABORT": ["500", "lost"],
    "DELETE": ["500", "503", "lost", "twice", "403"],
}


@dataclass(frozen=True)
class Step:
    """The `number`-th call of a kind goes wrong."""

    kind: str
    number: int
    how: Any

    def __str__(self) -> str:
        how = self.how
        if isinstance(how, Fault):
            how = f"{how.how}:{errno.errorcode[how.code]}" if how.how in ("error", "done") else how.how
        return f"{self.kind}:{self.number}:{how}"

    @classmethod
    def parse(cls, text: str) -> Step:
        kind, number, *how = text.split(":")
        if kind in REMOTE and kind not in LOCAL:
            return cls(kind, int(number), ":".join(how))
        code = getattr(errno, how[1]) if len(how) > 1 else errno.EIO
        if how[0] == "late":
            return cls(kind, int(number), LATE)
        return cls(kind, int(number), Fault(how[0], code))


@dataclass
class Armed:
    """Which calls there were, and which of them went wrong."""

    steps: list[Step] = field(default_factory=list)
    #: From the first step on everything goes wrong that way.
    forever: bool = False
    on: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    happened: list[str] = field(default_factory=list)
    #: The first part of the path of each that went wrong: the dataset, the artifact or the run.
    places: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def arm(self, steps: list[Step], forever: bool = False) -> None:
        with self.lock:
            self.steps, self.forever, self.on = list(steps), forever, True
            self.counts, self.happened, self.places = Counter(), [], []

    def disarm(self) -> None:
        with self.lock:
            self.on = False

    def undo(self) -> None:
        """What was said to go wrong last did not."""
        with self.lock:
            self.happened.pop()
            self.places.pop()

    def wrong(self, kind: str, what: str, path: str) -> Any:
        """How a call goes wrong, or None."""
        with self.lock:
            if not self.on:
                return None
            number = self.counts[kind]
            self.counts[kind] += 1
            for step in self.steps:
                if step.kind == kind and (step.number == number or (self.forever and self.happened)):
                    self.happened.append(f"{step} {what}")
                    self.places.append(path.split("/")[0])
                    return step.how
            return None


class Local:
    """A folder of this machine's disk, and a worker whose calls of the system are watched."""

    kinds = LOCAL

    def __init__(self, folder: Path) -> None:
        self.place = Place(str(folder / "place"))
        self.armed = Armed()
        self._folder, self._template = folder / "place", folder / "template"
        self._temporary = folder / "temporary"
        self._worker: Watched | None = None

    def worker(self) -> Worker:
        if self._worker is None:
            self._worker = Watched(self._folder, [MODULE], env={"TMPDIR": str(self._temporary)})
            self._worker.policy, self._worker.undone = self._policy, self.armed.undo
        return self._worker

    def _policy(self, call: Call) -> Fault | None:
        # The file that says that a lock is free again, and so on, are files like others.
        wrong: Fault | None = self.armed.wrong(
            call.kind, f"{call.name} {call.path} {call.to}".strip(), call.path
        )
        return wrong

    def end(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def empty(self) -> None:
        for folder in (self._folder, self._temporary):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def keep(self) -> None:
        shutil.rmtree(self._template, ignore_errors=True)
        shutil.copytree(self._folder, self._template)

    def restore(self) -> None:
        shutil.rmtree(self._folder)
        shutil.copytree(self._template, self._folder)
        shutil.rmtree(self._temporary)
        self._temporary.mkdir()

    def tree(self) -> set[str]:
        """Files, and folders without any, by their paths; temporary ones too."""
        return {
            f"{prefix}{path.relative_to(root)}{'/' if path.is_dir() else ''}"
            for root, prefix in ((self._folder, ""), (self._temporary, "temporary/"))
            for path in root.rglob("*")
            if not path.is_dir() or not any(path.iterdir())
        }


class Remote:
    """A bucket of an S3 server, behind a server that fails."""

    kinds = REMOTE

    def __init__(self, options: dict[str, str], armed: Armed, through: dict[str, str]) -> None:
        self.armed = armed
        self.place = Place(f"s3://{BUCKET}/place", {**through, "timeout": "3s"})
        self._client = client(options)
        self._kept: dict[str, tuple[str, bytes]] = {}
        self._worker: Worker | None = None

    def worker(self) -> Worker:
        if self._worker is None:
            self._worker = Worker([MODULE])
        return self._worker

    def end(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _keys(self) -> dict[str, str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="place/")
        return {found["Key"]: found["ETag"] for page in pages for found in page.get("Contents", ())}

    def empty(self) -> None:
        for key in self._keys():
            self._client.delete_object(Bucket=BUCKET, Key=key)
        for upload in self._client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ()):
            self._client.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])

    def keep(self) -> None:
        get = self._client.get_object
        self._kept = {
            key: (tag, get(Bucket=BUCKET, Key=key)["Body"].read()) for key, tag in self._keys().items()
        }

    def restore(self) -> None:
        there = self._keys()
        for key in there.keys() - self._kept.keys():
            self._client.delete_object(Bucket=BUCKET, Key=key)
        for key, (tag, body) in self._kept.items():
            if there.get(key) != tag:
                self._client.put_object(Bucket=BUCKET, Key=key, Body=body)
        for upload in self._client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ()):
            self._client.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])

    def tree(self) -> set[str]:
        uploads = self._client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())
        return {key.removeprefix("place/") for key in self._keys()} | {
            f"upload of {upload['Key'].removeprefix('place/')}" for upload in uploads
        }


def kind_of_request(method: str, key: str, headers: dict[str, str]) -> str:
    query = key.partition("?")[2]
    conditional = any(name.lower() in ("if-none-match", "if-match") for name in headers)
    if method == "POST":
        return "BEGIN" if query.startswith("uploads") else ("DELETE" if "delete" in query else "COMPLETE")
    if method == "PUT" and "uploadId" in query:
        return "PART"
    if method == "DELETE" and "uploadId" in query:
        return "ABORT"
    if method == "GET" and "list-type" in query:
        return "LIST"
    return "PUT-if" if method == "PUT" and conditional else method


@contextmanager
def place(store: str) -> Iterator[Local | Remote]:
    if store == "local":
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            local = Local(Path(folder))
            try:
                yield local
            finally:
                local.end()
        return
    armed = Armed()

    def act(method: str, key: str, headers: dict[str, str]) -> str | None:
        path = unquote(key)
        if not path.startswith("place/"):
            prefix = re.search(r"[?&]prefix=(place[^&]*)", path)
            if prefix is None:
                return None
            path = prefix[1]
        what = f"{method} {key}"
        wrong: str | None = armed.wrong(
            kind_of_request(method, key, headers), what, path.removeprefix("place").lstrip("/")
        )
        return wrong

    with s3_server() as options, proxy(options, act) as through:
        remote = Remote(options, armed, through)
        try:
            yield remote
        finally:
            remote.end()
