"""Everything that a GPU should show, on one page: `scripts/gpu`, or this with a Python that has this package and cuVS.

`python benches/gpu_page.py [--out DIR] [--minutes N] [--only contract,tests,...] [--full] [--rehearse]`

In order: what cuVS is taken for (gpu_contract.py), the tests that need a GPU, memcheck of `compute-sanitizer`, the pipeline's stages and
whole builds beside stock pylance's (gpu.py), a profile by `nsys`; the last two tools where they are there. A part that fails ends no other.
Writes gpu-results.md, gpu-results.json and each part's output into the folder, after each part: what was measured is kept whatever comes.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import _common

HERE = Path(__file__).parent
ROOT = HERE.parent
# The kinds of builds: rows, K and the rest of gpu.py's arguments.
BRIEF = (
    "--rows 1000000 --partitions 1024",
    "--rows 1000000 --partitions 1024 --metric dot --parts stages,ours",
    "--rows 1000000 --partitions 16384 --dtype float16 --metric cosine --parts stages,ours",
)
FULL = (
    "--rows 10000000 --partitions 1024",
    "--rows 10000000 --partitions 16384",
    "--rows 10000000 --partitions 65536 --sample-rate 64",
    "--rows 10000000 --partitions 16384 --metric cosine",
    "--rows 10000000 --partitions 16384 --metric dot",
    "--rows 10000000 --partitions 16384 --dtype float16",
)
REHEARSED = ("--rows 20000 --dim 64 --partitions 32 --sub-vectors 8 --runs 1 --max-iters 5",)


@dataclasses.dataclass
class Part:
    """A command, and what became of it."""

    name: str
    command: list[str]
    result: Path | None = None
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    rc: int | None = None
    seconds: float = 0.0
    note: str = ""
    found: Any = None

    def run(self, out: Path, left: float) -> None:
        if left <= 0:
            self.note = "no time was left"
            return
        began = time.perf_counter()
        with (out / f"{self.name}.log").open("wb") as log:
            try:
                self.rc = subprocess.run(
                    self.command, stdout=log, stderr=subprocess.STDOUT, cwd=out, timeout=left,
                    env={**os.environ, **self.environment},
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                self.note = "was ended: its time was over"
        self.seconds = time.perf_counter() - began
        if self.result is not None and self.result.exists():
            text = self.result.read_text()
            self.found = counted(text) if self.result.suffix == ".xml" else json.loads(text)

    @property
    def ok(self) -> bool:
        return self.rc == 0


def counted(junit: str) -> dict[str, int]:
    suites = list(ET.fromstring(junit).iter("testsuite"))
    return {
        key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")
    }


def parts(a: argparse.Namespace, out: Path) -> list[Part]:
    python = [sys.executable]
    contract = [*python, str(HERE / "gpu_contract.py")]
    small = ["--rows", "20000", "--dim", "64"] if a.rehearse else []
    # By name: others need more than a GPU machine must have.
    marks = ["-m", "gpu", "-rP", "tests/test_cuvs.py", "tests/test_device.py"]
    if a.rehearse:
        marks = ["-m", "not gpu", "tests/test_cuvs_care.py"]
    tests = [
        *python,
        "-m",
        "pytest",
        "-q",
        *marks,
        "-p",
        "no:cacheprovider",
        f"--rootdir={ROOT}",
        f"--junitxml={out / 'tests.xml'}",
    ]
    # Tests load the doubles themselves.
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and "doubles" not in p]
    own = {"LD_LIBRARY_PATH": "", "PYTHONPATH": os.pathsep.join(paths), "FAKE_CUDA_DEVICES": ""}
    needed = own if a.rehearse else {"LANCE_ARTIFACT_REQUIRE_GPU": "1"}
    made = [
        Part("contract", [*contract, *small, "--json", str(out / "contract.json")], out / "contract.json"),
        # From the checkout, whose settings and doubles they are of.
        Part("tests", ["env", "-C", str(ROOT), *tests], out / "tests.xml", needed),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        watched = [
            sanitizer,
            "--tool",
            "memcheck",
            "--error-exitcode",
            "9",
            *contract,
            "--encodings-only",
            "--json",
            str(out / "memcheck.json"),
        ]
        made.append(Part("memcheck", watched, out / "memcheck.json"))
    bench = [*python, str(HERE / "gpu.py"), "--folder", str(a.folder or out / "data")]
    for n, arguments in enumerate(REHEARSED if a.rehearse else FULL if a.full else BRIEF):
        result = out / f"builds-{n}.json"
        made.append(Part(f"builds-{n}", [*bench, *arguments.split(), "--json", str(result)], result))
    nsys = shutil.which("nsys")
    if nsys:
        shape = ["--rows", "500000", "--parts", "stages", "--runs", "1", "--json", str(out / "profiled.json")]
        report = str(out / "profile")
        made.append(
            Part(
                "profile",
                [
                    nsys,
                    "profile",
                    "-t",
                    "cuda,nvtx,osrt",
                    "--force-overwrite",
                    "true",
                    "-o",
                    report,
                    *bench,
                    *shape,
                ],
            )
        )
        stats = [
            nsys,
            "stats",
            "-r",
            "cuda_api_sum,cuda_gpu_kern_sum,cuda_gpu_mem_time_sum",
            f"{report}.nsys-rep",
        ]
        made.append(Part("profile-stats", stats))
    only = a.only.split(",") if a.only else None
    return [p for p in made if only is None or p.name.split("-")[0] in only]


def page(done: list[Part], facts: dict[str, Any], out: Path) -> str:
    lines = [
        f"# {facts['device']}, {facts['date']}",
        "",
        f"{facts['machine']}; {', '.join(f'{k} {v}' for k, v in facts['versions'].items())}.",
    ]
    if facts["rehearsal"]:
        lines += [
            "",
            "**A rehearsal over doubles of the driver and of cuVS: no GPU was there, and no time below means anything.**",
        ]
    lines += ["", "| part | came to | seconds |", "|---|---|---|"]
    for part in done:
        state = part.note or ("ok" if part.ok else f"FAILED ({part.rc}), see {part.name}.log")
        if part.name == "tests" and part.found:
            state += f": {part.found['tests']} tests, {part.found['failures'] + part.found['errors']} failed, {part.found['skipped']} skipped"
        lines.append(f"| {part.name} | {state} | {part.seconds:.0f} |")
    for tool in ("compute-sanitizer", "nsys"):
        if shutil.which(tool) is None:
            lines += ["", f"`{tool}` is not here."]
    for part in done:
        log = out / f"{part.name}.log"
        if part.name == "tests" or not log.exists():
            continue
        # Tables, and what stands between them; not what libraries say.
        shown = [
            line
            for line in log.read_text(errors="replace").splitlines()
            if not line or line.startswith(("|", "train", "ours", "stock", "one run"))
        ]
        lines += [
            "",
            f"## {part.name}",
            "",
            f"`{' '.join(Path(word).name if '/' in word else word for word in part.command)}`",
            "",
            *spaced(shown),
        ]
    return "\n".join(lines) + "\n"


def spaced(lines: list[str]) -> list[str]:
    """Tables apart from text and from each other, as Markdown wants them."""
    found: list[str] = []
    for line in lines:
        if found and line and found[-1] and line.startswith("|") != found[-1].startswith("|"):
            found.append("")
        if line or (found and found[-1]):
            found.append(line)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument(
        "--folder", type=Path, help="for datasets, kept; default in --out, removed at the end"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=24 * 60.0,
        help="after which nothing is begun, and what runs is ended",
    )
    parser.add_argument("--only", help="some of contract,tests,memcheck,builds,profile")
    parser.add_argument(
        "--full", action="store_true", help="10 million vectors, all metrics and types, K to 65,536"
    )
    parser.add_argument("--rehearse", action="store_true", help="over the doubles, in small")
    a = parser.parse_args(arguments)
    from lance_artifact.backends import available_backends

    found = available_backends()["cuvs"]
    if not found.ok:
        print("; ".join(found.missing), file=sys.stderr)
        return 1
    began, out = time.monotonic(), a.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = found.details["devices"][0]
    facts = {
        "device": f"{len(found.details['devices'])} x {device['name']}, CUDA {found.details['cuda_driver']}",
        "date": datetime.date.today().isoformat(),
        "machine": _common.machine(),
        "versions": {**_common.versions(), "cuvs": found.details["cuvs"]},
        "rehearsal": a.rehearse,
    }
    done: list[Part] = []
    for part in parts(a, out):
        print(f"{part.name}: {' '.join(part.command)}", file=sys.stderr, flush=True)
        part.run(out, a.minutes * 60 - (time.monotonic() - began))
        done.append(part)
        (out / "gpu-results.md").write_text(page(done, facts, out))
        results = [dataclasses.asdict(p) | {"ok": p.ok} for p in done]
        (out / "gpu-results.json").write_text(json.dumps({**facts, "parts": results}, indent=1, default=str))
    if a.folder is None:
        shutil.rmtree(out / "data", ignore_errors=True)
    print((out / "gpu-results.md").read_text())
    return 0 if all(part.ok for part in done) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
