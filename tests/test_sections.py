"""Sections of documents: against documents that were built from known sections, and against a Markdown parser."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pipeline.data.sections import Section, sections

SIGNS = "=-~^+"  # of underlined headings, from the highest level down
Part = tuple[int, str, list[str]]  # level, title, paragraphs

words = st.lists(st.sampled_from(["kite", "vole", "owl", "nest", "wing", "river"]), min_size=1, max_size=5).map(
    " ".join
)
paragraphs = st.lists(words.map(lambda text: f"A {text} sits here."), max_size=3)


@st.composite
def documents(draw: st.DrawFn) -> list[Part]:
    """Sections whose level rises by one at most, as all formats allow; the first is of level 1."""
    parts: list[Part] = []
    for _ in range(draw(st.integers(1, 8))):
        level = draw(st.integers(1, min(5, parts[-1][0] + 1))) if parts else 1
        parts.append((level, draw(words), draw(paragraphs)))
    return parts


def expected(parts: list[Part]) -> list[tuple[str, str]]:
    """Headings with those above them, and bodies."""
    found, path = [], list[str]()
    for level, title, body in parts:
        path = [*path[: level - 1], title]
        found.append((" > ".join(path), "\n\n".join(body)))
    return found


def written(parts: list[Part], suffix: str, heading: Any) -> list[tuple[str, str]]:
    text = "".join("\n\n".join([heading(level, title), *body]) + "\n\n" for level, title, body in parts)
    return [(section.heading, section.body) for section in sections(text, f"a.{suffix}.gz")]


@given(documents())
def test_headings_and_bodies_are_those_that_were_written(parts: list[Part]) -> None:
    def marked(mark: str) -> Any:
        return lambda level, title: f"{mark * level} {title}"

    def underlined(level: int, title: str) -> str:
        return f"{title}\n{SIGNS[level - 1] * len(title)}"

    def overlined(level: int, title: str) -> str:
        """The highest level with a line above too, as in Sphinx."""
        return f"{'=' * len(title)}\n{underlined(level, title)}" if level == 1 else underlined(level, title)

    for suffix, heading in (
        ("md", marked("#")),
        ("markdown", lambda level, title: f"{'#' * level} {title} {'#' * level}"),
        ("md", lambda level, title: f'<h{level} id="x">{title}</h{level}>'),
        ("adoc", marked("=")),
        ("adoc", underlined),
        ("org", marked("*")),
        ("rst", underlined),
        ("rst", overlined),
        ("txt", marked("#")),
        ("text", underlined),
    ):
        assert written(parts, suffix, heading) == expected(parts), suffix


BLOCKS = [
    "```sh\n# not a heading\n```",
    "~~~\n## nor this\n```\n# or this\n~~~",
    "    # indented code",
    "<!--\n# a comment\n-->",
    "> # quoted",
    "- an item\n---",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "#hashtag",
    "text\n\n---\n\nmore",
    "a `# b` line",
    "Setext\n===",
    "Setext two\n---",
    "# One",
    "### Three ###",
    "   ## Indented two",
    "####### seven",
]


@given(st.lists(st.sampled_from(BLOCKS), max_size=8))
def test_headings_of_markdown_are_those_of_a_parser(blocks: list[str]) -> None:
    """Lines and titles against markdown-it, which follows CommonMark."""
    text = "\n\n".join(blocks)
    tokens = MarkdownIt("commonmark").parse(text)
    theirs = [
        (token.map[0] + 1, inline.content)
        for token, inline in pairwise(tokens)
        if token.type == "heading_open" and token.level == 0 and token.map
    ]
    ours = [(each.line, each.heading.rpartition(" > ")[2]) for each in sections(text, "a.md") if each.heading]
    assert ours == theirs


def found(text: str, name: str = "a.md") -> list[tuple[str, str, int]]:
    return [(section.heading, section.body, section.line) for section in sections(text, name)]


def test_a_title_of_front_matter_or_a_keyword_is_above_all_headings() -> None:
    text = "---\ntitle: Birds\n---\nAn introduction.\n\n# Owls\n\nThey hoot.\n"
    assert found(text) == [("Birds", "An introduction.", 1), ("Birds > Owls", "They hoot.", 6)]
    assert found("#+TITLE: Birds\n\n* Owls\nThey hoot.\n", "a.org") == [
        ("Birds", "", 1),
        ("Birds > Owls", "They hoot.", 3),
    ]
    assert found("---\ntitle: Birds\n---\n\n# Owls\nThey hoot.\n") == [("Birds > Owls", "They hoot.", 5)]


def test_text_before_the_first_heading_has_none_and_comments_are_no_text() -> None:
    assert found("Words.\n\n# Owls\n\nThey hoot.\n") == [("", "Words.", 1), ("Owls", "They hoot.", 3)]
    assert found("<!-- a comment -->\n\n# Owls\n\nThey hoot.\n") == [("Owls", "They hoot.", 3)]
    assert found("Nothing but words.\n") == [("", "Nothing but words.", 1)]
    assert found("") == found("\n\n") == []


def test_headings_lose_their_markup_and_levels_may_be_skipped() -> None:
    text = "# The `run` *command*\n\na\n\n### [Flags](x.md)\n\nb\n\n## Exit code\n\nc\n"
    headings = ["The run command", "The run command > Flags", "The run command > Exit code"]
    assert [heading for heading, _, _ in found(text)] == headings


def test_what_is_no_text_of_a_section() -> None:
    """Names of the next heading, and in reStructuredText directives that stand for text elsewhere."""
    text = "Owls\n====\n\nThey hoot.\n\n.. _voles:\n\nVoles\n=====\n\n.. toctree::\n   :maxdepth: 1\n\n   a\n\n"
    text += "Nests\n=====\n\n.. code-block:: c\n\n   int eggs;\n"
    assert [body for _, body, _ in found(text, "a.rst")] == ["They hoot.", "", ".. code-block:: c\n\n   int eggs;"]


def test_lines_that_only_look_like_headings() -> None:
    long = "word " * 60
    for text, name in (
        (f"# {long}\n\ntext\n", "a.md"),
        (f"{long}\n{'=' * 300}\n", "a.rst"),
        ("A paragraph\nof two lines\n---\n", "a.md"),
        ("Name\n==\n", "a.rst"),
        ("====  ====\nA     B\n====  ====\n", "a.rst"),
        ("# a comment of a script\n", "a.rst"),
        ("----\n= code\n----\n", "a.adoc"),
        ("#+begin_src sh\n* code\n#+end_src\n", "a.org"),
        ("```\n# never closed\n", "a.md"),
        ("# \n\n###\n", "a.md"),
    ):
        assert all(not section.heading for section in sections(text, name)), text


@pytest.mark.parametrize("suffix", ["md", "rst", "adoc", "org", "txt"])
@given(text=st.text(st.sampled_from("ab #=-*`~<>!\n.:[]\t"), max_size=300))
def test_any_text_has_sections_in_order(suffix: str, text: str) -> None:
    made: list[Section] = list(sections(text, f"a.{suffix}"))
    lines = [section.line for section in made]
    assert lines == sorted(set(lines))
    for section in made:
        assert section.body in text
