"""The command `tep`: runs a command by its name, lists them all, says the version, and completes words for a shell.

    tep train --config pairs                         # the same as python jobs/train.py --config pairs

A command is a module of this folder: its docstring is what --help prints, `main(config, args)` does the work, and
`arguments()` makes its parser if it has arguments of its own. To add one, write the module and name it in COMMANDS.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import cast

from pipeline.config import Config
from pipeline.core.console import log
from pipeline.core.escaping import printable
from pipeline.core.outcome import Result
from pipeline.job import parser, run_job

COMMANDS = (
    *("run", "prepare", "train", "tune", "evaluate", "embed", "search"),
    *("mine", "map", "report", "export", "runs", "config", "clean"),
)
SUMMARISED = ("run", "prepare", "train", "tune", "evaluate", "embed")
NEXT = """first steps:
  tep run                                   # the whole job, on the Python packages installed here
  tep search remove duplicate rows          # then ask its index
  tep run --local-data-dir notes/ storage.run=notes
  tep train --help                          # a command's options, with examples
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    if words and words[0] in COMMANDS:
        return run_command(words[0], words[1:])
    if words[:1] in (["--help"], ["-h"]):
        _overview().print_help()
        return 0
    if words[:1] == ["--version"]:
        print(f"tep {_version()}")
        return 0
    if not words:
        _overview().print_help(sys.stderr)
        return 2
    near = difflib.get_close_matches(words[0], [*COMMANDS, "--help", "--version"], 1)
    meant = f"did you mean tep {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
    print(printable(f"tep: found no command {words[0]!r}; {meant}"), file=sys.stderr)
    return 2


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
    """Run a command with its arguments, by default this process's. Returns the exit code."""
    module = _module(name)

    def work(config: Config, args: argparse.Namespace) -> Result:
        result: Result = module.main(config, args)
        if name in SUMMARISED and result.summary is None:
            from pipeline.evaluation.summary import summary

            try:
                result.summary = summary(name, config, result)
            except Exception as error:  # the work is done, whatever a damaged file of the run keeps us from saying
                log.warning("%s: cannot summarise the run: %s: %s", name, type(error).__name__, error)
        return result

    return run_job(name, module.__doc__ or "", work, _arguments(name, module), argv)


def _module(name: str) -> ModuleType:
    return import_module(f"pipeline.commands.{name}")


def _arguments(name: str, module: ModuleType) -> argparse.ArgumentParser:
    return module.arguments() if hasattr(module, "arguments") else parser(name, module.__doc__ or "")


def _overview() -> argparse.ArgumentParser:
    """A parser of all commands with their arguments, for --help and completion."""
    overview = argparse.ArgumentParser(
        prog="tep",
        description="Train an embedding model on your own text, embed the corpus and search it.",
        epilog=NEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    overview.add_argument("--version", action="store_true", help="print the version of the package")
    commands = overview.add_subparsers(
        title="commands", metavar="COMMAND", parser_class=cast(type[argparse.ArgumentParser], _ready)
    )
    for name in COMMANDS:
        module = _module(name)
        commands.add_parser(name, help=(module.__doc__ or "").partition("\n")[0], ready=_arguments(name, module))
    return overview


def _ready(*, ready: argparse.ArgumentParser, prog: str) -> argparse.ArgumentParser:
    """A parser that exists already, where argparse's `add_parser` would make one."""
    return ready


def _complete() -> None:
    """Print what the word under the cursor may become, and exit: a shell's completion has called us."""
    import argcomplete

    argcomplete.autocomplete(_overview())


def _version() -> str:
    try:
        return version("text-embedding-pipeline")
    except PackageNotFoundError:
        return "of a copy that is not installed"


if __name__ == "__main__":
    sys.exit(main())
