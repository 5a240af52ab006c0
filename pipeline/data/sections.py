"""Splits documents at their headings: Markdown, reStructuredText, AsciiDoc, Org and plain text.

>>> text = "# Kites\\n\\nA kite is a bird.\\n\\n## Food\\n\\nVoles.\\n\\n# Owls\\n"
>>> [(section.heading, section.body) for section in sections(text, "a.md")]
[('Kites', 'A kite is a bird.'), ('Kites > Food', 'Voles.'), ('Owls', '')]

A section is the text under one heading up to the next, so sections do not overlap. Its heading is given with those
above it, because a heading alone often says little: of those in the Linux kernel's documentation 27% occur more than
once, and with the headings above 1% do. A title of front matter, or a title keyword, is above all other headings. Text
before the first heading has the heading "".

Headings are lines with marks (`## Food`, `== Food`, `** Food`, `<h2>Food</h2>`) or underlined lines, as the suffix of
the file says. Lines in code blocks and comments are none. Tests compare this with a Markdown parser, which would do for
Markdown alone. Cost: linear, 15 MB/s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.data.input_files import without_compression
from pipeline.data.titles import TITLE_KEYWORD, clean_heading, front_matter, line_after, text_lines

MAX_HEADING_CHARS = 200  # longer lines are text. Ours
MAX_UNDERLINE_STYLES = 6  # of reStructuredText and plain text; more than that are tables and rules. Ours
SEPARATOR = " > "

_SAME = {"markdown": "md", "text": "txt"}
_MARKS = {  # by suffix; the number of marks is the heading's level
    "md": re.compile(r" {0,3}(#{1,6})[ \t]"),
    "adoc": re.compile(r"([=#]{1,6})[ \t]"),
    "org": re.compile(r"(\*{1,99})[ \t]"),
    "txt": re.compile(r"(#{1,6})[ \t]"),
}
_UNDERLINES = {"md": "=-", "adoc": "=-~^+"}
"""By suffix, from the highest level down. Elsewhere any sign, in the order in which a document uses them."""
_HTML_HEADING = re.compile(r"<h([1-6])\b[^<>]*>(.*)</h[1-6]>", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]*>")
_INLINE = re.compile(r"\[([^\[\]]{0,200})\]\([^()]{0,200}\)|[`*]")  # a link, whose text stays, and marks
_NO_TITLE = re.compile(r"\s|[-+*>|]\s|\|")  # code, lists, quotes and tables, which may have a rule under them
_TARGET = re.compile(r"\.\. _|\[\[|\[#|<a ")  # a name of the heading that follows
_ELSEWHERE = re.compile(r"$|\s|:|\.\. (?:toctree|include|contents|only|raw|kernel-\w+|(?:\w+:)?auto\w+)::")
_FENCE = re.compile(r"(`{3,})[^`]*$|(~{3,})")
_DELIMITER = re.compile(r"([-.=*_+/])\1{3,}$")  # of AsciiDoc's blocks
_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class Section:
    """The headings above a text, joined; the text; the line of the last heading, or 1 before the first."""

    heading: str
    body: str
    line: int


@dataclass(frozen=True)
class _Heading:
    """A heading in lines `start` to `stop`. Level 0 is above all others."""

    level: int
    title: str
    start: int
    stop: int


def sections(text: str, name: str) -> Iterator[Section]:
    """The sections of a document, also empty ones; `name` is that of its file, whose suffix tells the format."""
    suffix = without_compression(name).lower().rpartition(".")[2]
    suffix = _SAME.get(suffix, suffix)
    fields, start = front_matter(text)
    lines, before = text[start:].splitlines(), len(text[:start].splitlines())
    title = fields.get("title", fields.get("Title"))
    path = [(0, " ".join(title.split()))] if isinstance(title, str) and _WORD.search(title) else []
    line = first = 0
    for heading in (*_headings(lines, suffix), _Heading(0, "", len(lines), len(lines))):
        body = lines[first : heading.start]
        if line or next(text_lines(body, suffix), None) is not None:
            yield Section(SEPARATOR.join(title for _, title in path), _trimmed(body), max(line, 1))
        while path and heading.level and path[-1][0] >= heading.level:
            path.pop()
        path.append((heading.level, heading.title))
        line, first = before + heading.start + 1, heading.stop


def _trimmed(body: list[str]) -> str:
    """The text without blank lines and names of the next heading at its ends; "" if all of it is elsewhere."""
    if all(map(_ELSEWHERE.match, body)):
        return ""
    stop = len(body)
    while stop and (not body[stop - 1].strip() or _TARGET.match(body[stop - 1])):
        stop -= 1
    return "\n".join(body[:stop]).strip("\n")


def _headings(lines: list[str], suffix: str) -> Iterator[_Heading]:
    styles = list(_UNDERLINES.get(suffix, ""))
    i = after = 0  # `after`: the line after the last heading
    while i < len(lines):
        line = lines[i].strip()
        found = None
        if line and len(line) <= MAX_HEADING_CHARS and _WORD.search(line):
            found = _marked(lines, i, line, suffix, after) or _underlined(lines, i, suffix, after, styles)
        if found is not None:
            yield found
            i = after = found.stop
        elif is_end := _block_end(line, suffix):
            i = line_after(lines, i + 1, is_end)
        else:
            i += 1


def _marked(lines: list[str], i: int, line: str, suffix: str, after: int) -> _Heading | None:
    marks = _MARKS.get(suffix)
    if marks and (found := marks.match(lines[i])):
        return _heading(len(found[1]), line, i, i + 1)
    if suffix == "md" and (found := _HTML_HEADING.fullmatch(line)):
        return _heading(int(found[1]), _TAG.sub("", found[2]), i, i + 1)
    return _heading(0, line, i, i + 1) if not after and TITLE_KEYWORD.match(line) else None


def _underlined(lines: list[str], i: int, suffix: str, after: int, styles: list[str]) -> _Heading | None:
    """The heading whose title is line `i` and whose underline is the next one. Adds a new kind of line to `styles`."""
    title, under = lines[i].strip(), lines[i + 1].rstrip() if i + 1 < len(lines) else ""
    shortest = {"md": 2, "adoc": len(title) - 2}.get(suffix, min(len(title), 4))
    if len(under) < max(2, shortest) or under.count(under[0]) < len(under) or under[0].isalnum():
        return None
    before = lines[i - 1].rstrip() if i > after else ""
    is_fixed = suffix in _UNDERLINES
    has_overline = not is_fixed and before == under
    if not has_overline and (before or _NO_TITLE.match(lines[i])):
        return None
    style = under[0] * (1 + has_overline)
    if style not in styles:
        if is_fixed or len(styles) == MAX_UNDERLINE_STYLES:
            return None
        styles.append(style)
    return _heading(1 + styles.index(style), title, i - has_overline, i + 2)


def _heading(level: int, title: str, start: int, stop: int) -> _Heading | None:
    title = " ".join(_INLINE.sub(r"\1", clean_heading(title)).split())
    return _Heading(level, title, start, stop) if _WORD.search(title) else None


def _block_end(line: str, suffix: str) -> Callable[[str], bool] | None:
    """A test for the last line of the code block or comment that this line begins; None if it begins none."""
    if fence := _FENCE.match(line):
        marks = fence[1] or fence[2]
        return lambda text: text.strip().startswith(marks) and not text.strip().strip(marks[0])
    if line.startswith("<!--") and "-->" not in line:
        return lambda text: "-->" in text
    if suffix == "adoc" and _DELIMITER.match(line):
        return lambda text: text.strip() == line
    if suffix == "org" and line.lower().startswith("#+begin_"):
        return lambda text: text.strip().lower() == line.lower().split()[0].replace("begin", "end", 1)
    return None
