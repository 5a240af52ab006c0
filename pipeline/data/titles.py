"""Finds the title of a note in Markdown, Org, reStructuredText, AsciiDoc or plain text.

>>> read_note("---\\ntitle: Kites\\ndraft: true\\n---\\nA kite is a bird.\\n", "a.md")
Note(title='Kites', body='A kite is a bird.\\n', text='A kite is a bird.\\n', line=1)
>>> read_note("<!-- mine -->\\n# Kites\\n\\nA kite is a bird.\\n", "a.md").title
'Kites'

The title is, in this order: `title` of the front matter (YAML between `---`, TOML between `+++`); after front matter
without one, the first heading; a title keyword (`#+TITLE:`, `:title:`, `.. title:`, `Title:`); the first line that is
not a comment, a directive, a property, a date or a copyright notice. Front matter that cannot be parsed is text. Cost:
linear in the length of the text; a note without front matter reads its first lines only.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.data.input_files import without_compression

MAX_FRONT_MATTER_CHARS = 16_000  # some hundred times the usual length; parsing takes 1 s per MB
_YAML_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # gives text only, so no date or number can be invalid
_FENCES = {"---": ("---", "..."), "+++": ("+++",)}

TITLE_KEYWORD = re.compile(r"(?:#\+|:|\.\. ?)?(?:doc)?title:\s*(?=\S)", re.IGNORECASE)
_PROPERTY = re.compile(
    r"(?:#\+\w+|:[\w-][^:\n]*):(?:\s|$)"  # Org's keywords, fields of reStructuredText, attributes of AsciiDoc
    r"|(?:date|created|modified|updated|published|authors?|layout|slug|tags|categor(?:y|ies)|keywords|status|draft"
    r"|permalink|lang|template|summary|licen[sc]e|copyright|title):(?:\s|$)"  # front matter without its fences
    r"|(?:include|ifn?def|ifeval|endif)::",
    re.IGNORECASE,
)
_DATE = re.compile(
    r"\W*(?:\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4})"
    r"(?:[T\s,]+\d{1,2}:\d{2}(?::\d{2})?(?:\.\d+)?\s*(?:Z|[+-]\d{2}:?\d{2})?)?\W*"
    r"|(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?,?\s+)?(?:\d{1,2}(?:st|nd|rd|th)?\.?\s+)?"
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?(?:\s+\d{1,2}(?:st|nd|rd|th)?)?,?\s+\d{4}",
    re.IGNORECASE,
)
_NOTICE = re.compile(
    r"\W*(?:SPDX-|copyright\s*(?:\(c\)|©|\d{4})|©|\(c\)\s*\d{4}|all rights reserved"
    r"|(?:this \w+ is )?(?:licen[sc]ed|distributed|released) (?:under|to))",
    re.IGNORECASE,
)
_HEADING = re.compile(r"(?:#{1,6}|={1,6}|\*+)\s+(?=\S)")
_HEADING_MARK = re.compile(r"(?:#+|=+|\*+(?=\s))\s*")
MAX_DATE_CHARS = 60
_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class Note:
    """A note's title ("" if there is none), the text after it, the text without front matter, and the title's line."""

    title: str
    body: str
    text: str
    line: int


def read_note(text: str, name: str) -> Note:
    """The parts of a note; `name` is that of its file, whose suffix tells the format."""
    fields, start = front_matter(text)
    content = text[start:]
    title = fields.get("title", fields.get("Title"))
    if isinstance(title, str) and _WORD.search(title):
        return Note(" ".join(title.split()), content, content, 1)
    lines, before = content.splitlines(), len(text[:start].splitlines())
    suffix = without_compression(name).lower().rpartition(".")[2]
    first = next(text_lines(lines, suffix), None)
    if first is None:
        return Note("", content, content, 1)
    found = first
    if fields and not _is_heading(lines, first):
        found = next((i for i in text_lines(lines, suffix) if _is_heading(lines, i)), first)
    after = found + 2 if _is_underlined(lines, found) else found + 1
    return Note(clean_heading(lines[found]), "\n".join(lines[first:found] + lines[after:]), content, before + found + 1)


def front_matter(text: str) -> tuple[dict[str, Any], int]:
    """The fields of the front matter, and the index in the text where it ends; no fields and 0 if there is none."""
    beginning = text[:MAX_FRONT_MATTER_CHARS]
    fence, *lines = beginning.splitlines(keepends=True) or [""]
    ends = _FENCES.get(fence.rstrip(), ())
    end = next((i for i, line in enumerate(lines) if line.rstrip() in ends), None)
    if end is None:
        return {}, 0
    block = "".join(lines[:end])
    try:
        fields = yaml.load(block, _YAML_LOADER) if fence.startswith("-") else tomllib.loads(block.replace("\r\n", "\n"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}, 0
    if not isinstance(fields, dict):
        return {}, 0
    return fields, len(fence) + sum(map(len, lines[: end + 1]))


def text_lines(lines: list[str], suffix: str) -> Iterator[int]:
    """Indices of the lines with words in them that are no comment, directive, property, date or notice."""
    i = 0
    while i < len(lines):
        line = lines[i].strip()
        skipped = _skipped(lines, i, line, suffix)
        if skipped == i and _WORD.search(line):
            yield i
        i = max(skipped, i + 1)


def _skipped(lines: list[str], i: int, line: str, suffix: str) -> int:
    """The index after the comment, block or property that begins at line `i`; `i` if none does."""
    if line.startswith("<!--"):
        return line_after(lines, i, lambda text: "-->" in text)
    if line.startswith("////") and suffix == "adoc":
        return line_after(lines, i + 1, lambda text: text.strip() == line)
    if line.lower() == ":properties:":
        return line_after(lines, i, lambda text: text.strip().lower() == ":end:")
    if line.lower().startswith("#+begin_comment"):
        return line_after(lines, i, lambda text: text.strip().lower() == "#+end_comment")
    if line.startswith("```"):
        return line_after(lines, i + 1, lambda text: text.strip().startswith("```"))
    if TITLE_KEYWORD.match(line):
        return i
    if line == ".." or line.startswith(".. ") or (suffix == "rst" and _PROPERTY.match(line)):
        return line_after(lines, i + 1, lambda text: bool(text) and not text[0].isspace()) - 1
    if _NOTICE.match(line):  # with the rest of its paragraph
        return line_after(lines, i, lambda text: not _WORD.search(text))
    is_markup = {"adoc": line.startswith(("//", "[")), "org": line.startswith("# ") or line == "#"}.get(
        suffix,
        line.startswith(("![", "[![")),  # images, such as badges
    )
    is_date = len(line) <= MAX_DATE_CHARS and _DATE.fullmatch(line) and not _HEADING.match(line)
    return i + 1 if is_markup or is_date or _PROPERTY.match(line) else i


def line_after(lines: list[str], i: int, is_last: Callable[[str], bool]) -> int:
    """The index after the first line from `i` for which `is_last` holds; beyond the last line if none does."""
    return next((j + 1 for j in range(i, len(lines)) if is_last(lines[j])), len(lines) + 1)


def _is_heading(lines: list[str], i: int) -> bool:
    return bool(_HEADING.match(lines[i].strip())) or _is_underlined(lines, i)


def _is_underlined(lines: list[str], i: int) -> bool:
    underline = lines[i + 1].strip() if i + 1 < len(lines) else ""
    return len(underline) > 1 and len(set(underline)) == 1 and not underline[0].isalnum()


def clean_heading(line: str) -> str:
    """A title without its keyword or the marks of a heading."""
    line = line.strip()
    for mark in (TITLE_KEYWORD, _HEADING_MARK):
        if found := mark.match(line):
            line = line[found.end() :]
    without_closing = line.rstrip("#")
    return without_closing.rstrip() if without_closing[-1:].isspace() else line
