"""Renders a page: one HTML file with its data, styles and plotly.js, which asks no network for anything.

    html = render(Page("quickstart", "trained on …", [Section("scores", "Scores", tables=[score_table])]))

Texts are escaped by the template. Characters that move a cursor or change the direction of text are shown as escapes,
and long texts are cut, also in the JSON of charts. A content security policy names the hash of each script, so that no
other one can run. Size: 4.9 MB, of which plotly.js is 4.8; a map of 5,000 points adds 3.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from pipeline.core.escaping import printable
from pipeline.report.charts import Chart

HERE = Path(__file__).parent
CELL_CHARS = 2_000
BLOCK_CHARS = 200_000  # of the config
_NUMBER = re.compile(r"-?[\d,]{1,30}(\.\d{1,30})?|–|")


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading; empty parts are left out. See page.html.jinja for the shapes."""

    id: str
    title: str
    text: str = ""
    verdicts: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    wide: list[Chart] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    map: dict[str, Any] | None = None
    rejected: list[dict[str, Any]] = field(default_factory=list)
    queries: list[dict[str, Any]] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    sections: list[Section]
    numbers: list[tuple[str, str]] = field(default_factory=list)
    """Names and values of the first row."""
    runs: list[str] = field(default_factory=list)
    """Names of the runs, for the colours of their lines."""


def render(page: Page) -> str:
    """The page's HTML."""
    from plotly.offline import get_plotlyjs

    scripts = {"plotly": get_plotlyjs(), "js": (HERE / "page.js").read_text(encoding="utf-8")}
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts.values())
    number = 0
    for section in page.sections:
        for chart in (*section.wide, *section.charts):
            number += 1
            chart |= {"id": f"chart-{number}", "figure": clean(chart["figure"])}
        if section.map:
            section.map["data"] = clean(section.map["data"])
    return _template().render(
        **vars(page) | {"runs": clean(page.runs)},
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script_hashes=Markup(" ".join(f"'sha256-{digest}'" for digest in hashes)),
        **{name: Markup(text) for name, text in scripts.items()},
    )


@functools.cache
def _template() -> Any:
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, finalize=_finalize, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "sort_keys": False, "separators": (",", ":")}
    return environment.get_template("page.html.jinja")


def _finalize(value: Any) -> Any:
    """What the template prints for a value: one line without characters that act."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return one_line(value, CELL_CHARS)
    return value


def one_line(text: str, chars: int) -> str:
    """The text with single blanks, at most `chars` characters, unprintable ones as escapes."""
    line = " ".join(text[: 2 * chars].split())
    return printable(line if len(line) <= chars else f"{line[: chars - 1]}…")


def block(text: str) -> Markup:
    """A text of several lines, escaped."""
    cut = text[:BLOCK_CHARS]
    return escape("\n".join(printable(line) for line in cut.split("\n")))


def clean(value: Any) -> Any:
    """JSON with printable strings; NaN, infinity and other objects become null."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float) else None


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """A table for the template; columns of numbers are aligned to the right."""
    cells = [[each if isinstance(each, str) else number(each) for each in row] for row in rows]
    columns = zip(*cells, strict=True) if cells else [()] * len(header)
    numbers = [any(column) and all(_NUMBER.fullmatch(cell) for cell in column) for column in columns]
    return {"header": list(header), "rows": cells, "numbers": numbers}


def number(value: Any) -> str:
    """A number for people: 1,234 or 0.8521; a dash if there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """A duration for people: 43 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
