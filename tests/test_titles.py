"""Titles of notes, in the forms in which editors, site generators and wikis write them."""

from __future__ import annotations

import pytest

from pipeline.data.titles import read_note

BODY = "Salt keeps cabbage for a whole winter.\n"
NOTES = {  # name → how the file begins; its title is "Pickling in winter"
    "yaml.md": "---\ndate: 2023-11-02\ntitle: Pickling in winter\ntags:\n  - food\n---\n",
    "quoted.md": "---\ntitle: 'Pickling in winter'\n...\n",
    "crlf.md": '---\r\nTitle: "Pickling in winter"\r\n---\r\n',
    "toml.md": '+++\ndate = 2023-11-02\ntitle = "Pickling in winter"\n[extra]\nweight = 3\n+++\n',
    "heading.md": "---\nlayout: post\n---\n\nAn introduction.\n\n## Pickling in winter\n",
    "setext.md": "---\nlayout: post\n---\nAn introduction.\n\nPickling in winter\n------------------\n",
    "invalid_date.md": "---\ndate: 2023-99-99\ntitle: Pickling in winter\n---\n",
    "comment.md": "<!-- one line -->\n<!--\ntitle: not this\n\n-->\n\n# Pickling in winter #\n",
    "badge.md": "[![build](a.svg)](b)\n\n# Pickling in winter\n",
    "notice.txt": "Copyright (c) 2021 The Cellar\nLicensed under the MIT licence.\n\nPickling in winter\n",
    "spdx.md": "SPDX-License-Identifier: MIT\n\n# Pickling in winter\n",
    "date.txt": "2023-11-02 18:30\n\nPickling in winter\n",
    "spoken_date.txt": "2 November 2023\nPickling in winter\n",
    "fields.txt": "Layout: post\nDate: 2023-11-02\nTitle: Pickling in winter\n",
    "keyword.org": "#+STARTUP: showall\n#+Title: Pickling in winter\n",
    "drawer.org": ":properties:\n:ID: 7\n:END:\n# a comment\n#+title:   Pickling in winter\n",
    "headline.org": "#+BEGIN_COMMENT\nnot this\n#+END_COMMENT\n* Pickling in winter\n",
    "comment.rst": "..\n   a comment\n\n   that goes on\n\n:Author: me\n   and others\n\nPickling in winter\n====\n",
    "overline.rst": ".. _label:\n\n====================\n Pickling in winter\n====================\n",
    "nikola.rst": ".. title: Pickling in winter\n.. slug: pickling\n",
    "attributes.adoc": "////\na block\n////\n// a line\n:toc:\n[[anchor]]\n= Pickling in winter\n",
    "plain.txt": "\n\n  Pickling in winter\n",
}


@pytest.mark.parametrize("name", NOTES)
def test_the_title_of_a_note(name: str) -> None:
    content = NOTES[name] + "\n" + BODY
    note = read_note(content, f"folder/{name}.gz")
    assert note.title == "Pickling in winter"
    assert note.body.strip().endswith(BODY.strip())
    assert "Pickling" not in note.body
    if content.startswith(("---", "+++")):
        assert not any(word in note.text for word in ("2023", "layout", "food", "weight", "title"))
    else:
        assert note.text == content


def test_text_before_the_heading_stays_and_the_line_is_that_of_the_file() -> None:
    note = read_note(NOTES["heading.md"] + BODY, "a.md")
    assert note.body.startswith("An introduction.\n")
    assert note.line == 7


def test_front_matter_that_cannot_be_parsed_is_text() -> None:
    for beginning in (
        "---\ntitle: [open\n---\n",
        "+++\ntitle = \n+++\n",
        "---\n- a list\n---\n",
        "---\ntitle: never closed\n",
        f"---\n{'[' * 9_000}\n---\n",
        f"---\ntitle: {'x' * 20_000}\n---\n",
    ):
        assert read_note(beginning + BODY, "a.md").text == beginning + BODY
    assert read_note("---\ntitle: {a: b}\n---\nFirst line\n" + BODY, "a.md").title == "First line"


def test_an_explicit_heading_may_be_a_date_and_nothing_but_comments_has_no_title() -> None:
    assert read_note("# 2023-11-02\n" + BODY, "a.md").title == "2023-11-02"
    for text in ("<!-- never closed\n" * 3, "----\n****\n", ""):
        note = read_note(text, "a.md")
        assert (note.title, note.body) == ("", text)


HARD = {  # beginning, what is repeated, end
    "blanks": ("", " ", "A title"),
    "comments": ("", "<!--\n", ""),
    "directives": ("", ".. x\n", ""),
    "marks": ("", "©", "x"),
    "date": ("2023-11-02 10:00", " ", "x"),
    "hashes": ("# a", " #", "x"),
    "stars": ("", "*", "x"),
    "keyword": ("title:", " ", "x"),
    "fenced": ("---\na: b\n---\n", "word\n", ""),
}


@pytest.mark.parametrize("case", HARD)
def test_the_cost_is_linear_in_the_length(case: str) -> None:
    """A quadratic search would take hours."""
    begin, repeated, end = HARD[case]
    assert len(read_note(begin + repeated * 1_000_000 + end, "a.md").text) >= 1_000_000
