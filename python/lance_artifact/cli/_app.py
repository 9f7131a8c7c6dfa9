"""The program: its commands, what they print, and how it ends."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from .. import __version__
from .. import exceptions as errors
from ._told import Lines, Stages

EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.ArtifactNotFoundError, 3),
    (errors.ArtifactExistsError, 4),
    (errors.CorruptArtifactError, 5),
    (errors.ArtifactMismatchError, 6),
    (errors.BackendUnavailableError, 7),
    (errors.CommitConflictError, 8),
    (errors.IndexExistsError, 9),
    (errors.StorageError, 10),
    (errors.DeviceError, 11),
    (errors.InvalidInputError, 2),
    (errors.ColumnNotFoundError, 2),
    (errors.ColumnTypeError, 2),
    (KeyboardInterrupt, 130),
)

EPILOG = """\b
Exit codes:
  0 done   1 unexpected error   2 bad argument, column or input   3 no artifact, or run, there
  4 an artifact is there   5 corrupt artifact   6 artifact, model or run does not fit
  7 backend unavailable   8 commit conflict   9 index exists   10 storage error   11 device error
  130 interrupted (Ctrl-C, SIGTERM: 143)"""

COMPLETE_VARIABLE = "_LANCE_ARTIFACT_COMPLETE"


@dataclass
class Call:
    """How a command was called, and what it told meanwhile.

    Attributes
    ----------
    progress : bool or callable
        What functions of the package take: bars on a terminal, else a line every ten seconds, or nothing.
    stages : Stages
    """

    json: bool
    progress: Any
    stages: Stages


def printable(text: str) -> str:
    """Without what a terminal would obey: names in manifests are whatever their writers wrote."""
    return "".join(
        c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else f"\\x{ord(c):02x}" for c in text
    )


def finite(value: Any) -> Any:
    """A result with None for what is no number in JSON: NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, (list, tuple)) else value


class Printable(logging.Formatter):
    """Messages of the log, printable."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


Result = tuple[dict[str, Any], str] | tuple[dict[str, Any], str, int]
"""What a command gives: for --json, for people, and an exit code where it is not 0."""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True},
    epilog=EPILOG,
    no_args_is_help=True,
)
@click.version_option(__version__, message="%(version)s")
def app() -> None:
    """IVF_PQ vector indexes for stock Lance, built through partition artifacts."""


def command(name: str, group: click.Group = app) -> Callable[[Callable[..., Result]], click.Command]:
    """A command of the program. The function gets the `Call` first, and its docstring is the help."""

    def make(function: Callable[..., Result]) -> click.Command:
        @functools.wraps(function)
        def run(*args: Any, as_json: bool, no_progress: bool, verbose: int, **kwargs: Any) -> int:
            stages = Stages()
            logger = logging.getLogger("lance_artifact")
            before = logger.level
            # The figures of the result come from the log, whatever of it is shown.
            logger.setLevel(logging.DEBUG if verbose > 1 else logging.INFO)
            shown = logging.StreamHandler()
            shown.setLevel([logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)])
            shown.setFormatter(Printable("%(message)s"))
            propagate, logger.propagate = logger.propagate, False
            logger.addHandler(shown)
            logger.addHandler(stages)
            try:
                quiet = no_progress or as_json
                progress: Any = False if quiet else (True if sys.stderr.isatty() else Lines())
                result, text, *code = function(*args, call=Call(as_json, progress, stages), **kwargs)
            finally:
                logger.removeHandler(shown)
                logger.removeHandler(stages)
                logger.setLevel(before)
                logger.propagate = propagate
            try:
                click.echo(json.dumps(finite(result), allow_nan=False) if as_json else printable(text))
            except BrokenPipeError:
                # Whoever read the output has seen enough.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return code[0] if code else 0

        for option in (
            click.option("-v", "--verbose", count=True, help="Say each stage; twice: what Lance does too.", show_default=False),
            click.option("--no-progress", is_flag=True, help="No bars, and no lines where there is no terminal."),
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, also of an error."),
        ):  # fmt: skip
            run = option(run)
        return group.command(name, epilog=EPILOG)(run)

    return make


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors go to stderr, results to stdout."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = next((a for a in arguments if not a.startswith("-")), "")
    try:
        code = app.main(
            arguments, prog_name="lance-artifact", standalone_mode=False, complete_var=COMPLETE_VARIABLE
        )
        sys.stdout.flush()
        return int(code or 0)
    except click.ClickException as error:
        where = error.ctx.get_usage() + "\n" if isinstance(error, click.UsageError) and error.ctx else ""
        return _failed(error, error.format_message(), 2, name, arguments, where)
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except (errors.LanceArtifactError, KeyboardInterrupt, click.Abort) as error:
        known = KeyboardInterrupt if isinstance(error, click.Abort) else type(error)
        code = next((c for kind, c in EXIT_CODES if issubclass(known, kind)), 1)
        return _failed(error, str(error) or "interrupted", code, name, arguments)
    except Exception as error:
        if any(a.startswith("-v") or a == "--verbose" for a in arguments):
            traceback.print_exc()
        message = f"unexpected {type(error).__name__}: {error}. This is a defect; -v shows where it came from"
        return _failed(error, message, 1, name, arguments)


def _failed(
    error: BaseException, message: str, code: int, name: str, arguments: Sequence[str], where: str = ""
) -> int:
    if "--json" in arguments:
        click.echo(json.dumps({"error": type(error).__name__, "message": message}))
    click.echo(printable(f"{where}lance-artifact {name}: {message}".replace(" : ", ": ")), err=True)
    return code
