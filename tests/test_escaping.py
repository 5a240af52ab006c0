"""What is printed or logged has no character that acts on a terminal, and no line of its own. Oracle: unicodedata."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.commands.search import line
from pipeline.core import escaping
from pipeline.core.console import log, log_lines, other_output_to_log, start_logging, stop_logging, table
from pipeline.core.escaping import printable
from pipeline.index.search import Hit
from tests.conftest import run_here, write_jsonl

HOSTILE = [
    "\x1b]0;renamed\x07",
    "a\nprepare: forged",
    "b\r99  0.999  forged",
    "\x9b31m",
    "\x85next",
    "\u2028line\u2029paragraph",
    "\u202egnp.exe\u2066",
    "\ufeffmark",
    "\x7f\x00",
    "\ud800",
]
ORDINARY = ["naïve", "می‌خواهم", "東京　都", "👨‍👩‍👧", "a\u00a0b", "C:\\new"]
acting = st.sampled_from([*HOSTILE, "\x0b", "\x1c", "\u2067", "\x80"])
texts = st.lists(st.text(max_size=20) | acting, max_size=5).map("".join)


def acts(letter: str) -> bool:
    """Whether a character controls a terminal, ends a line or changes the order of display, as Unicode classes it."""
    overrides = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return unicodedata.category(letter) in ("Cc", "Zl", "Zp", "Cs") or unicodedata.bidirectional(letter) in overrides


def only_lines(text: str, count: int) -> None:
    """Assert that a text has `count` lines, and no other character that acts."""
    lines = text.split("\n")
    assert len(lines) == count
    assert not any(map(acts, "".join(lines)))


def test_escapes_are_those_of_pythons_literals_and_ordinary_text_stays() -> None:
    for text in HOSTILE:
        only_lines(printable(text), 1)
        assert printable(text).encode().decode("unicode_escape") == text
    assert [*map(printable, ORDINARY)] == ORDINARY


def hit(text: str) -> Hit:
    return Hit(1, 0.5, text, text, text, {"name": text, text: text, "file": text, "line": text})


def check_everything_printed(text: str) -> None:
    only_lines(printable(text), 1)
    only_lines(line(hit(text)), 2)
    only_lines(table([(text, 1), (1, text)], (text, "b")), 4)


def test_results_and_tables_of_hostile_texts() -> None:
    for text in HOSTILE:
        check_everything_printed(text)


@pytest.mark.slow
@settings(max_examples=1000)
@given(texts)
def test_results_and_tables_of_any_text(text: str) -> None:
    check_everything_printed(text)


def logged(folder: Path, *texts: str) -> str:
    """What training.log has after these texts were logged, each as a message and as an exception's."""
    file = start_logging(folder, "INFO", "%(levelname)s %(message)s")
    try:
        for text in texts:
            log.info("found %s", text)
            file.write_traceback(ValueError(text))
    finally:
        stop_logging()
    return (folder / "training.log").read_text("utf-8")


def test_a_record_is_one_line_and_a_traceback_is_indented(tmp_path: Path) -> None:
    text = logged(tmp_path, *HOSTILE)
    lines = text.removesuffix("\n").split("\n")
    assert not any(map(acts, "".join(lines)))
    assert {line.partition(" ")[0] for line in lines} == {"INFO", "ERROR", ""}
    assert sum(line.startswith("INFO ") for line in lines) == len(HOSTILE)


@pytest.mark.slow
@settings(max_examples=1000)
@given(texts)
def test_a_record_of_any_text_is_one_line(text: str) -> None:
    formatter = start_logging(Path(tempfile.gettempdir()), "INFO", "%(message)s").formatter
    stop_logging()
    assert formatter is not None
    record = log.makeRecord("pipeline", logging.INFO, "", 0, "%s and %r", (text, text), None)
    only_lines(formatter.format(record), 1)


def test_a_table_is_logged_line_by_line(tmp_path: Path) -> None:
    start_logging(tmp_path, "INFO", "%(levelname)s %(message)s")
    log_lines(table([("a\nERROR forged", 1)], ("name", "n")))
    stop_logging()
    lines = (tmp_path / "training.log").read_text("utf-8").splitlines()
    assert lines == ["INFO name             n", "INFO ---------------  -", "INFO a\\nERROR forged  1"]


def test_output_of_libraries_is_escaped_and_indented_in_the_log(tmp_path: Path) -> None:
    start_logging(tmp_path, "INFO", "%(levelname)s %(message)s")
    program = r"import os; os.write(2, b'INFO forged \x1b[1A\xff\tend\r\n\xe2\x80\xae')"
    try:
        with other_output_to_log():
            subprocess.run([sys.executable, "-c", program], check=True)
    finally:
        stop_logging()
    text = (tmp_path / "training.log").read_text("utf-8")
    assert text == "  INFO forged \\x1b[1A\\xff    end\n  \\u202e\n"


WITH_HELPER = r"""
import os, signal, sys
from pathlib import Path
import psutil
from pipeline.core.console import other_output_to_log, start_logging, stop_logging

start_logging(Path(sys.argv[1]), "INFO", "%(message)s")
with other_output_to_log():
    os.write(2, b"INFO forged \x1b[2J\rnext\n")
    os.write(2, b"its last words \x9b")
    print(*(child.pid for child in psutil.Process().children()), file=sys.__stdout__, flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
stop_logging()
"""


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_the_process_that_escapes_ends_with_the_job(end: str, tmp_path: Path) -> None:
    """Also with a job that is killed, whose last words it writes."""
    command = [sys.executable, "-c", WITH_HELPER, str(tmp_path), end]
    job = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=False)
    assert job.returncode == (0 if end == "finished" else -signal.SIGKILL)
    (helper,) = map(int, job.stdout.split())
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(helper).status() != psutil.STATUS_ZOMBIE:  # a killed job's may not be reaped
            time.sleep(0.01)
    text = (tmp_path / "training.log").read_text("utf-8")
    assert text == "  INFO forged \\x1b[2J\\rnext\n  its last words \\x9b\n"


def test_names_in_errors_are_shown_escaped_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, object]] = [{"title\x1b[2J\nprepare: forged": "x", "\u202eb": "y"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    source = f"{{name: s, type: json, path: {tmp_path / 'a.jsonl'}, fields: {{text: text}}}}"
    code, reply, out, err = run_here(
        capsys, "prepare", f"data.sources=[{source}]", f"storage.root={tmp_path / 'root'}", "storage.run=r"
    )
    assert (code, reply["status"]) == (2, "failed")
    only_lines(out, 2)
    only_lines(err, 2)
    assert "title\\x1b[2J\\nprepare: forged, \\u202eb" in err


def test_replies_in_json_are_ascii_and_give_the_original_back() -> None:
    for text in HOSTILE:
        reply = json.dumps({"id": text, text: 1})
        assert reply.isascii()
        assert reply.isprintable()
        assert json.loads(reply) == {"id": text, text: 1}


def test_the_program_splits_lines_that_are_too_long() -> None:
    command = [sys.executable, "-I", "-S", escaping.__file__]
    raw = b"x" * (escaping.LINE_BYTES + 1) + b"\n\x1b\n"
    written = subprocess.run(command, input=raw, capture_output=True, check=True).stdout.decode()
    assert [len(each) for each in written.splitlines()] == [escaping.LINE_BYTES + 2, 3, 6]
