"""The typer application: global flags, logging to stderr, and one place where errors become exit codes."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from loadstone._version import __version__
from loadstone.cli import streams
from loadstone.cli.render import one_line
from loadstone.errors import LoadstoneError, MissingError

app = typer.Typer(
    name="loadstone",
    help="Turn a trained model into an artifact that anyone can [bold]load[/], [bold]trust[/] and "
    "[bold]measure[/].\n\nResults go to stdout, progress and logs to stderr. Exit codes: 0 done, 1 unexpected "
    "error, 2 usage, 3 artifact invalid or not loadable here, 4 a gate failed, 5 something needed is missing.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Code that takes locks, and its functions that wait without holding one.
_LOCKING = ("/threading.py", "/concurrent/futures/thread.py", "/concurrent/futures/_base.py")
_WAITING = ("wait", "_wait_for_tstate_lock")
# Each command's module.
COMMANDS = {
    "finalize": "finalize",
    "eval": "evaluate",
    "fit": "fit",
    "predict": "predict",
    "inspect": "inspect",
    "export-fakequant": "export_fakequant",
}
GLOBAL_FLAGS = ("-q", "--quiet", "-v", "--verbose", "--debug")
log = logging.getLogger("loadstone")
# In torch's error for a CPU without memory, which has no class of its own.
_ALLOCATOR = "DefaultCPUAllocator"


def _version(value: bool) -> None:
    if value:
        typer.echo(f"loadstone {__version__}")
        raise typer.Exit


@app.callback()
def _globals(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Warnings and errors only; no progress bars."),
    verbose: bool = typer.Option(False, "-v", "--verbose", help="Say more about each step."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    # Also read, wherever they stand on the line, by `main`; declared here so that --help lists them.
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    if os.environ.get("RANK", "0") != "0":
        level = logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level)
    if not verbose:
        # Library chatter (import notices, load reports) would bury our own lines.
        for name in ("torchao", "transformers", "accelerate", "datasets", "torch"):
            logging.getLogger(name).setLevel(logging.ERROR)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        label = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"loadstone: {label}{one_line(record.getMessage())}"


def _without_pydantic() -> None:
    """Spare commands what typer (0.29) does for each option: a pydantic schema, also for texts, paths and what is not
    given.

    To import pydantic for that took a third of the time of `inspect`. Other releases of typer are left as they are.
    """
    option: Any = getattr(import_module("typer.core"), "_TyperParameter", None)
    own = getattr(option, "process_value", None)
    if own is None or own.__module__ == __name__:
        return

    def process_value(self: Any, context: Any, value: Any) -> Any:
        kind = self.type_descriptor.annotation
        plain = value is None and not self.required
        if isinstance(value, str) and kind in (str, Path):
            # typer refuses paths that cannot be read.
            plain = kind is str or not os.access(value, os.F_OK) or os.access(value, os.R_OK)
            value = kind(value) if plain else value
        if self.multiple or self.nargs != 1 or not plain:
            return own(self, context, value)
        return self.callback(context, self, value) if self.callback else value

    option.process_value = process_value


def _register(args: list[str]) -> None:
    """Add the command that is asked for, so that no other's options take time; all of them when none is."""
    first = next((a for a in args if not a.startswith("-")), "")
    for module in [COMMANDS[first]] if first in COMMANDS else COMMANDS.values():
        import_module(f"loadstone.cli.{module}").register(app)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with the code the outcome calls for."""
    args = list(sys.argv[1:] if argv is None else argv)
    # Global flags are welcome on either side of the command name.
    globals_ = [a for a in args if a in GLOBAL_FLAGS]
    args = _with_json_target(globals_ + [a for a in args if a not in GLOBAL_FLAGS])
    debug = "--debug" in globals_
    streams.protect()
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _stop_again
    # The libraries' imports make a million objects that stay: looking for garbage among them takes a third of the time.
    gc.set_threshold(200_000, 20, 100)
    try:
        Path.cwd()
    except OSError:
        # MKL ends the process there, without an exception.
        _fail("the current directory no longer exists. Change to another one", MissingError.exit_code)
    try:
        _without_pydantic()
        _register(args)
        app(args=args, prog_name="loadstone")
    except SystemExit as stop:
        # typer has turned Ctrl-C into an exit without a word.
        if stop.code == 130:
            _fail("interrupted", 130)
        if not stop.code and (error := streams.lost_output()) is not None:
            _fail(f"stdout cannot be written ({error.strerror}): the result is not whole there", 5)
        raise
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Terminated:
        _fail("interrupted", 143)
    except Exception as error:
        if debug:
            traceback.print_exc()
        _fail(*_outcome(error))


def _with_json_target(args: list[str]) -> list[str]:
    """``--json`` with nothing behind it, or another option, means ``--json -``: typer has no optional values."""
    found: list[str] = []
    for this, following in zip(args, [*args[1:], "--"], strict=True):
        found.append(this)
        if this == "--json" and following.startswith("-") and following != "-":
            found.append("-")
    return found


def _outcome(error: Exception) -> tuple[str, int]:
    """What to say about an error, and the exit code that it calls for."""
    from loadstone.writing.filesystem import explain

    if isinstance(error, LoadstoneError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError) or _ALLOCATOR in str(error):
        return "there is not enough memory. Free some, or work on a smaller part", MissingError.exit_code
    if isinstance(error, OSError) and (refusal := explain(error, "the system refused a file")):
        return str(refusal), refusal.exit_code
    if sys.flags.optimize > 1:
        # transformers reads docstrings as it is imported.
        needs = "python -OO and PYTHONOPTIMIZE=2 leave out what transformers needs. Use -O, or neither"
        return needs, MissingError.exit_code
    text = " ".join(str(error).split()) or type(error).__name__
    name = type(error).__name__
    return f"unexpected {name}: {text[:500]}. Run again with --debug for the traceback", 1


class Terminated(BaseException):
    """SIGTERM arrived: unwinds the stack so that temporary files are removed, then exits with 143."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    code = frame.f_code if frame else None
    if code and code.co_filename.endswith(_LOCKING) and code.co_name not in _WAITING:
        # An exception between taking a lock and the block that gives it back would leave it taken for good.
        _again(signum)
    else:
        raise Terminated


def _again(number: int) -> None:
    """Handle the signal again in a moment, wherever the program is then."""

    def again(_: int, frame: FrameType | None) -> None:
        handler: Any = signal.getsignal(number)
        handler(number, frame)

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _stop_again(lost: sys.UnraisableHookArgs) -> None:
    """Stop again where a signal arrived in a call-back whose exceptions Python ignores (of a weak reference, say)."""
    if isinstance(lost.exc_value, Terminated | KeyboardInterrupt):
        _again(signal.SIGTERM if isinstance(lost.exc_value, Terminated) else signal.SIGINT)
    else:
        sys.__unraisablehook__(lost)


def _fail(message: str, code: int) -> None:
    print(f"loadstone: error: {one_line(message)}", file=sys.stderr)
    sys.exit(code)
