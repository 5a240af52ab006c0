"""The frame of every job: arguments, signals, exit code and the JSON line at the end.

    def main(config: Config, args: Namespace) -> Result: ...
    if __name__ == "__main__":
        sys.exit(run_job("train", __doc__, main))

Exit codes: 0 done, 1 failed, 2 bad config or arguments, 130 on Ctrl-C, 143 on SIGTERM. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline.config import Config, ConfigError, load
from pipeline.config.reading import ALLOWED_ARGUMENTS, meant_override
from pipeline.core.console import log, start_logging, stop_logging
from pipeline.core.escaping import printable
from pipeline.core.object_store import BucketError, redacted
from pipeline.core.outcome import EXPECTED_ERRORS, Result, error_sentence
from pipeline.core.signals import signals

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def check_reachable(config: Config) -> None:
    """Raise ConfigError if storage.root is in a bucket that is missing or cannot be reached."""
    try:
        config.root.exists()
    except BucketError as error:
        raise ConfigError(f"storage.root: {error}") from None


_WORD = "\0"
"""Prefix that makes argparse take an argument for a word although it looks like an option; no argument contains it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"arguments: {message.replace(_WORD, '')}; --help lists what is allowed")


def parser(
    name: str, description: str, query: bool = False, prepares: bool = True, runs: bool = False
) -> argparse.ArgumentParser:
    """An argument parser with the arguments that jobs share; `prepares` adds those of jobs that may prepare data.

    With `query`, the arguments that are not `section.key=value` are the words of the query, and with `runs`, names of
    runs.
    """
    arguments = _Parser(
        prog=f"python jobs/{name}.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = arguments.add_argument
    add("--config", default=str(DEFAULT_CONFIG), metavar="FILE", help="YAML file (default: %(default)s)")
    read = "folder to read instead of the source's path; by default its text files are read, title → the rest"
    add("--local-data-dir", "--local_data_dir", metavar="DIR", help=read)
    arguments.epilog = "All config keys, with units and defaults: pipeline/config/"
    if prepares:
        add("--rehash", action="store_true", help="compare input files by content, not by size and modification time")
        add("--check", action="store_true", help="only check whether the cluster has what the job needs")
    name, meaning = "section.key=value", "config values that override the file's"
    if query:
        name, meaning = f"QUERY | {name}", f"the words of the query, after -- whatever they look like; {meaning}"
    elif runs:
        name, meaning = f"RUN | {name}", f"names of runs under storage.root; {meaning}"
    add("overrides", nargs="*", metavar=name, help=meaning)
    arguments.set_defaults(query="" if query else None, runs=[] if runs else None)
    return arguments


def parse(arguments: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments and separate the query from the overrides. Raises ConfigError for invalid arguments."""
    argv = sys.argv[1:] if argv is None else argv
    for argument in argv:
        if "\0" in argument or any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise ConfigError(f"arguments: found {argument!r}; allowed is text in UTF-8")
    is_search = arguments.get_default("query") is not None
    end = argv.index("--") if "--" in argv else len(argv)
    marked = [_WORD + word if is_search and _looks_like_an_option(word) else word for word in argv[:end]]
    args, unknown = arguments.parse_known_intermixed_args([*marked, *(_WORD + word for word in argv[end + 1 :])])
    if unknown:
        raise ConfigError(f"arguments: {_explain_option(unknown[0], argv, arguments, is_search)}")
    if is_search:
        args.query, args.overrides = _query_of(args.overrides)
    if args.runs is not None:
        args.runs = [word for word in args.overrides if "=" not in word]
        args.overrides = [word for word in args.overrides if "=" in word]
    for name, value in vars(args).items():
        if isinstance(value, list):
            setattr(args, name, [each.removeprefix(_WORD) for each in value])
        elif isinstance(value, str):
            setattr(args, name, value.removeprefix(_WORD))
    return args


def _looks_like_an_option(word: str) -> bool:
    """Whether argparse would take a word such as `-Wall` for an option; no job has options with one hyphen but -h."""
    return bool(re.match(r"-(?!-|h$|[\d.]+$)", word))


def _query_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """Separate the query from overrides. A text such as "training.seed=1 fails" is a query if there is no other."""
    sections = "|".join(Config.model_fields)
    overrides = [word for word in words if re.match(rf"({sections})(\.\w+)+=", word)]
    query = [word for word in words if word not in overrides]
    if not query:
        query = [word for word in overrides if len(word.split()) > 1 and not re.search(r"=\s*[\[{]", word)][-1:]
        overrides = [word for word in overrides if word not in query]
    if not query:
        example = f" -- '{overrides[-1]}'" if overrides else ' "remove duplicate rows"'
        raise ConfigError(f"query: found no text to search for; give one, as in python jobs/search.py{example}")
    return " ".join(word.removeprefix(_WORD) for word in query), overrides


def _explain_option(option: str, argv: Sequence[str], arguments: argparse.ArgumentParser, is_search: bool) -> str:
    """What an unknown option should have been."""
    name, _, value = option.partition("=")
    after = argv[argv.index(option) + 1 :][:1]
    value = value or next((word for word in after if not word.startswith("-") and "=" not in word), "")
    options = re.findall(r"--[\w-]+", arguments.format_usage())
    if near := difflib.get_close_matches(name, options, 1, 0.8):
        meant = f"did you mean {near[0]}?"
    else:
        meant = meant_override(name, value, Config) or ALLOWED_ARGUMENTS
    found = f"{option} {value}" if value and "=" not in option else option
    search = f"; to search for it, write it after --, as in -- '{option}'" if is_search else ""
    return f"found the option {found}; {meant}{search}"


def run_job(
    name: str,
    description: str,
    main: Callable[[Config, argparse.Namespace], Result],
    arguments: argparse.ArgumentParser | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse arguments, load the config, run `main` and print the result. Returns the exit code."""
    started, config, log_file = time.monotonic(), None, None
    hook, before = sys.unraisablehook, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals.install()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding lacks
    status, code, result, sentence = "ok", 0, Result(), ""
    try:
        args = parse(arguments or parser(name, description), argv)
        config = load_config(args)
        check_reachable(config)
        log_file = start_logging(config.log_dir, config.logging.level, config.logging.format)
        result = main(config, args)
    except SystemExit as error:  # Ray raises it on SIGTERM while it starts
        if log_file is None:
            raise  # --help
        signals.number = signal.SIGTERM if error.code == signal.SIGTERM else signal.SIGINT
        status, code, sentence = "stopped", 128 + signals.number, "stopped while Ray was starting"
    except BaseException as error:  # a panic in a Rust library is not an Exception
        if _is_interrupt(error):
            status, code = "stopped", 128 + signals.number
            sentence = f"stopped by {signal.Signals(signals.number).name}; run the same command to continue"
        else:
            status, code, sentence = "failed", 2 if isinstance(error, ConfigError) else 1, error_sentence(error)
            if log_file and not isinstance(error, EXPECTED_ERRORS):
                log_file.write_traceback(error)
    signals.ignore()
    if sentence:
        _say(sentence if sentence.startswith(f"{name}: ") else f"{name}: {sentence}")
    stop_logging()
    last = {
        "job": name,
        "status": status,
        "run_dir": str(config.run_dir) if config else None,
        "metrics": result.metrics,
        "paths": result.paths,
        "seconds": round(time.monotonic() - started, 1),
    }
    reply = result.reply if status == "ok" and result.reply is not None else last
    print(json.dumps(_finite(reply), allow_nan=False), flush=True)
    for number, handler in before.items():
        signal.signal(number, handler)
    sys.unraisablehook = hook
    return code


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether a signal is the cause. Python 3.11 wraps an exception that is raised in a class body."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def load_config(args: argparse.Namespace) -> Config:
    """The config that the arguments describe."""
    if args.local_data_dir is None:
        return load(args.config, args.overrides)
    if any(override.startswith("data.sources") for override in args.overrides):
        raise ConfigError("--local-data-dir: found data.sources too; use only one of them")
    folder = Path(args.local_data_dir)
    if not folder.is_dir():
        raise ConfigError(f"--local-data-dir: found no folder at {folder}; pass a folder of text files")
    return load(args.config, args.overrides, local_data_dir=folder)


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, with null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say(sentence: str) -> None:
    one_line = " ".join(sentence.split())
    if log.handlers:
        log.error("%s", one_line)
    else:
        print(redacted(printable(one_line)), file=sys.stderr, flush=True)
