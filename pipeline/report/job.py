"""Writes the report of a run, or of several runs beside each other.

    write_report(config).paths["report"]            # <run>/report.html
    compare(config, ["first", "second"])            # <root>/reports/first-second.html

A report is an artifact that follows from the run's files, so it is made again only if one of them has changed. Only the
latest is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly
from pydantic import ValidationError

from pipeline.config import Config, ConfigError
from pipeline.config.tree import Storage
from pipeline.core.artifact import Artifact
from pipeline.core.console import log
from pipeline.core.files import link_or_copy, remove_folder, sorted_glob, xxh3_of
from pipeline.core.outcome import JobError, Result, error_sentence
from pipeline.core.path import StoragePath
from pipeline.report.facts import collect, exists, inputs
from pipeline.report.page import Page, render
from pipeline.report.sections import comparison, run_page

FORMAT = 1  # raise it when the page changes: earlier ones are made again
PAGE = "report.html"
TITLE_CHARS = 100


def write_report(config: Config) -> Result:
    """Write `report.html` into the run's folder. Raises JobError if there is no such run."""
    _check(config)
    home = config.run_dir / "reports"
    made = _make(home, {"run": inputs(config)}, lambda: run_page(collect(config)))
    return _publish(made, config.run_dir / PAGE)


def try_report(config: Config) -> dict[str, str]:
    """The paths of `write_report`; if it fails, a warning and no paths, because the run itself did not fail."""
    try:
        return write_report(config).paths
    except Exception as error:  # whatever is wrong with a page must not fail the job
        log.debug("the report failed", exc_info=error)
        log.warning("report: it could not be written: %s", error_sentence(error))
        return {}


def compare(config: Config, names: Sequence[str]) -> Result:
    """Write one page that compares runs of the config's storage.root; with one name, its report."""
    names = list(dict.fromkeys(names))
    runs = [_named(config, name) for name in names]
    for run in runs:
        _check(run)
    if len(runs) == 1:
        return write_report(runs[0])
    home, title = config.root / "reports", "-".join(names).replace("/", "-")[:TITLE_CHARS]
    key = {name: inputs(run) for name, run in zip(names, runs, strict=True)}
    made = _make(home / title, key, lambda: comparison([collect(run) for run in runs]))
    return _publish(made, home / f"{title}.html")


def _named(config: Config, name: str) -> Config:
    try:
        storage = Storage(root=config.storage.root, run=name)
    except ValidationError:
        raise ConfigError(f"RUN: found {name!r}; allowed are names of runs, such as quickstart") from None
    return config.model_copy(update={"storage": storage})


def _check(run: Config) -> None:
    if not exists(run):
        known = ", ".join(folder.name for folder in sorted_glob(run.root / "runs", "*")) or "none"
        raise JobError(f"{run.run_dir} holds no run to report on; the runs of {run.root} are: {known}")


def _make(home: StoragePath, key: dict[str, Any], page: Any) -> Artifact:
    report = Artifact(home, "", {"format": FORMAT, "plotly": plotly.__version__, "of": key})

    def fill() -> dict[str, Any]:
        content: Page = page()
        report.output.write(PAGE, render(content).encode())
        return {"title": content.title}

    report.make(fill)
    return report


def _publish(made: Artifact, path: StoragePath) -> Result:
    """Link the page to where people look for it, and remove earlier ones."""
    page = made.folder / PAGE
    if not path.is_file() or xxh3_of(path) != xxh3_of(page):
        link_or_copy(page, path)
        for folder in sorted_glob(made.folder.parent, "*"):
            if folder.name != made.folder.name:
                remove_folder(folder)
    log.info("report: %s", path)
    return Result({"bytes": page.stat().st_size}, {"report": str(path)})
