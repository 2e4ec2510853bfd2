"""The `penstock` command.

The rules kept here: what a command needs is imported when that command is chosen, so that `penstock serve` needs no
database driver. Whatever is wrong is said in one line on stderr, and by the exit code.

Exit codes: 0 done, or stopped in good order by SIGTERM; 1 it could not start, or left something behind; 2 wrong usage;
130 stopped in good order by Ctrl-C, and 128 and the signal's number when a second signal ended it at once.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from .tasks.targets import TargetError

__all__ = ["main"]

_COMMANDS = {
    "serve": ("pipeline.tasks.web.serve", "serve the page, the events and the cancelling of tasks over HTTP"),
    "worker": ("pipeline.tasks.backends.postgres.command", "do the tasks that were submitted to a PostgresTaskBackend"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that these arguments name, and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        chosen, parser = _parser(arguments)
        args = parser.parse_args(arguments)
        return import_module(_COMMANDS[chosen or ""][0]).run(args)
    except TargetError as error:
        return _fail(error, 2)
    except ImportError as error:  # an extra that is missing; the message says how to install it
        return _fail(error, 1)


def _parser(arguments: Sequence[str]) -> tuple[str | None, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser("penstock", description="Streaming pipelines, and tasks that can be watched and cancelled.")
    parser.add_argument("--version", action="version", version=f"penstock {_version()}")
    commands = parser.add_subparsers(metavar="command", required=True)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (module, help) in _COMMANDS.items():
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        if name == chosen:
            import_module(module).add_arguments(command)
    return chosen, parser


def _version() -> str:
    try:
        return version("penstock")
    except PackageNotFoundError:  # a checkout that was not installed
        return "(not installed)"


def _fail(error: Exception, code: int) -> int:
    if error.__cause__ is not None and isinstance(error, TargetError):  # the target's own code has raised
        traceback.print_exception(error.__cause__)
    sys.stderr.write(f"penstock: {error}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
