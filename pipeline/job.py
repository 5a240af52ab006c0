"""What every job shares: its arguments, its exit code and its last line.

    def main(config: Config, args: Namespace) -> Result: ...
    if __name__ == "__main__":
        sys.exit(run_job("train", __doc__, main))

Exit codes: 0 done, 1 failed, 2 bad config or arguments, 130 on Ctrl-C, 143 on SIGTERM. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
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
from pipeline.core.console import log, start_logging, stop_logging
from pipeline.core.object_store import BucketError
from pipeline.core.outcome import EXPECTED, Result, sentence_of
from pipeline.core.signals import signals

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def check_reachable(config: Config) -> None:
    """Raise ConfigError if storage.root is in a bucket that is missing or unreachable."""
    try:
        config.root.exists()
    except BucketError as error:
        raise ConfigError(f"storage.root: {error}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"arguments: {message}; --help lists what is allowed")


def parser(name: str, description: str, query: bool = False, prepares: bool = True) -> argparse.ArgumentParser:
    """The arguments that all jobs share, and with `prepares` those of jobs that may prepare data.

    With `query`, the one argument that is not `section.key=value` is the job's query.
    """
    own = _Parser(
        prog=f"python jobs/{name}.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    own.add_argument("--config", default=str(DEFAULT_CONFIG), metavar="FILE", help="YAML file (default: %(default)s)")
    own.add_argument(
        "--local_data_dir", metavar="DIR", help="a folder of text files, used instead of data.sources: title → the rest"
    )
    meaning = "config values that override the file's"
    own.epilog = "Every key of the config, with its unit and default: pipeline/config/"
    if prepares:
        own.add_argument(
            "--rehash", action="store_true", help="compare input files by content, not by size and modification time"
        )
        own.add_argument("--check", action="store_true", help="only check whether the cluster has what the job needs")
    if query:
        own.add_argument("overrides", nargs="*", metavar="QUERY | section.key=value", help=f"the query; {meaning}")
    else:
        own.add_argument("overrides", nargs="*", metavar="section.key=value", help=meaning)
    own.set_defaults(query="" if query else None)
    return own


def parse(arguments: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and separate the query from the overrides. Raises ConfigError for other arguments."""
    args = arguments.parse_intermixed_args(argv)
    if args.query is not None:
        queries = [word for word in args.overrides if not re.match(r"\w+(\.\w+)+=", word)]
        if len(queries) != 1:
            raise ConfigError(f"arguments: found {len(queries)} queries; allowed is one, in quotes")
        args.query = queries[0]
        args.overrides = [word for word in args.overrides if word is not queries[0]]
    return args


def run_job(
    name: str,
    description: str,
    main: Callable[[Config, argparse.Namespace], Result],
    arguments: argparse.ArgumentParser | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, load the config, run `main`, report. Returns the exit code."""
    started, config, log_file = time.monotonic(), None, None
    hook, before = sys.unraisablehook, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals.install()
    status, code, result, sentence = "ok", 0, Result(), ""
    try:
        args = parse(arguments or parser(name, description), argv)
        config = load_config(args)
        check_reachable(config)
        log_file = start_logging(config.log_dir, config.logging.level, config.logging.format)
        result = main(config, args)
    except SystemExit as error:  # Ray's answer to SIGTERM while it starts
        if log_file is None:
            raise  # --help
        signals.number = signal.SIGTERM if error.code == signal.SIGTERM else signal.SIGINT
        status, code, sentence = "stopped", 128 + signals.number, "stopped while Ray was starting"
    except BaseException as error:  # a panic in a Rust library is not an Exception
        if _is_interrupt(error):
            status, code = "stopped", 128 + signals.number
            sentence = f"stopped by {signal.Signals(signals.number).name}; run the same command to continue"
        else:
            status, code, sentence = "failed", 2 if isinstance(error, ConfigError) else 1, sentence_of(error)
            if log_file and not isinstance(error, EXPECTED):
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
    """Whether a signal is the cause: Python 3.11 wraps an exception that is raised in a class body."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def load_config(args: argparse.Namespace) -> Config:
    """The config that the arguments describe."""
    if args.local_data_dir is None:
        return load(args.config, args.overrides)
    if any(override.startswith("data.sources") for override in args.overrides):
        raise ConfigError("--local_data_dir: found data.sources too; allowed is one of the two")
    folder = Path(args.local_data_dir)
    if not folder.is_dir():
        raise ConfigError(f"--local_data_dir: found no folder at {folder}; allowed is a folder of text files")
    source = {"name": "local", "type": "text", "path": str(folder.resolve())}
    return load(args.config, args.overrides, sources=[source])


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by null."""
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
        print(one_line, file=sys.stderr, flush=True)
