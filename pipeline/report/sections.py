"""What the report of one run says, section by section; and the comparison of several runs.

    page = run_page(collect(config))               # summary, data, training, scores, queries, map, config
    page = comparison([facts, …])                  # what differs in config, data and scores; curves over each other

A section says so if the run has nothing for it yet, and names the command that makes it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from pipeline.core.outcome import flatten
from pipeline.evaluation.report import TITLES, score_rows
from pipeline.report.charts import funnel_chart, length_charts, score_chart, training_charts
from pipeline.report.facts import Facts
from pipeline.report.page import Page, Section, block, duration, number, one_line, table

CLASSES = {"better": "better", "worse": "worse"}
KINDS = {
    "best": "queries that the model answers best, BM25 worst first",
    "worst": "queries that the model answers worst, BM25 best first",
    "random": "random queries",
}
EXCERPT_CHARS = 240


def run_page(run: Facts) -> Page:
    """The report of one run."""
    sections = [_summary(run), _data(run), _training(run), _scores(run), _queries(run), _map(run), _about(run)]
    return Page(run.name, _subtitle(run), sections, _numbers(run), [run.name])


def _subtitle(run: Facts) -> str:
    began = run.jobs[0]["began"][:16].replace("T", " ") if run.jobs else ""
    sources = ", ".join(source.name for source in run.manifest.sources) if run.manifest else "no prepared data yet"
    return " · ".join(filter(None, (began and f"{began} UTC", sources, str(run.folder))))


def _numbers(run: Facts) -> list[tuple[str, str]]:
    found = []
    if run.manifest:
        kept, read = (sum(getattr(s, name) for s in run.manifest.sources) for name in ("rows_kept", "rows_in"))
        found.append((f"records kept of {read:,}", f"{kept:,}"))
    if run.steps:
        found.append((f"steps of {run.steps:,}", number(_step(run))))
    seconds = _stage_seconds([run]).get(run.name, {})
    found += [(f"to {name}", duration(taken)) for name, taken in seconds.items()]
    for task, result in run.scores.items():
        for system in ("model", "bm25"):
            if isinstance(result.get(system), dict) and "ndcg@10" in result[system]:
                name = "BM25" if system == "bm25" else "model"
                found.append((f"NDCG@10 on {task}, {name}", f"{result[system]['ndcg@10']:.3f}"))
    return found


def _step(run: Facts) -> int:
    steps = [row["step"] for row in run.metrics if isinstance(row["step"], int)]
    return max([*steps[-1:], int(run.state.get("step", 0))], default=0)


def _verdicts(run: Facts, prefix: str = "") -> list[dict[str, str]]:
    return [
        {
            "verdict": each["verdict"],
            "class": CLASSES.get(each["verdict"], "unclear"),
            "sentence": f"{prefix}{each['sentence']}",
        }
        for each in run.evaluation.get("comparisons", [])
    ]


def _summary(run: Facts) -> Section:
    verdicts, text = _verdicts(run), ""
    if not run.steps:
        text = "The run is not trained yet: python jobs/train.py trains it."
    elif _step(run) < run.steps and not run.state.get("ended_early") and not run.evaluation:
        text = f"The run is at step {_step(run):,} of {run.steps:,}; the same command continues it."
    elif not run.evaluation:
        text = "The model has no scores yet: python jobs/evaluate.py scores it."
    elif not verdicts:
        text = (
            "There is no verdict, because there was no retrieval task with something to compare with. Give pairs, or a "
            "BEIR folder as evaluation.beir_dir."
        )
    return Section("summary", "Summary", text, verdicts=verdicts, warnings=run.warnings())


def _data(run: Facts) -> Section:
    if run.manifest is None:
        return Section("data", "Data", "The run's data are not prepared, or were deleted: python jobs/prepare.py.")
    funnel = funnel_chart(run)
    sources = run.manifest.sources
    reasons = sorted({reason for source in sources for reason in source.rejected})
    rows = [
        [source.name, source.rows_in, source.rows_kept, *(source.rejected.get(reason, 0) for reason in reasons)]
        for source in sources
    ]
    tables = [table(["source", "in", "kept", *reasons], rows)] if len(sources) > 1 else []
    return Section(
        "data",
        "Data",
        wide=[funnel] if funnel else [],
        tables=tables,
        charts=length_charts(run),
        rejected=list(_rejected(run)),
    )


def _rejected(run: Facts) -> Iterator[dict[str, Any]]:
    """Examples of rejected records, a group for each reason."""
    counts: dict[str, int] = {}
    for source in run.manifest.sources if run.manifest else []:
        for reason, rejected in source.rejected.items():
            counts[reason] = counts.get(reason, 0) + rejected
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        rows = [
            [_cut(row["source_id"]), _cut(row["excerpt"]), _cut(row["duplicate_of"])]
            for row in run.rejected
            if row["reason"] == reason
        ]
        header = ["record", "begins", "is like" if any(row[2] for row in rows) else ""]
        yield {"title": f"rejected as {reason}: {count:,} records", "table": table(header, rows)}


def _cut(text: str | None) -> str:
    return one_line(text or "", EXCERPT_CHARS)


def _training(run: Facts) -> Section:
    if not run.metrics:
        return Section("training", "Training", "There are no metrics yet: python jobs/train.py trains the model.")
    charts = training_charts([run])
    note = ""
    if any(line["name"].startswith("BM25") for chart in charts for line in chart["figure"]["data"]):
        note = (
            "Validation ranks the held-out pairs among themselves, BM25 too; the scores below are of harder tasks, "
            "with more documents."
        )
    return Section("training", "Training", note, charts=charts)


def _scores(run: Facts) -> Section:
    if not run.scores:
        return Section("scores", "Scores", "There are no scores yet: python jobs/evaluate.py makes them.")
    chart = score_chart([run])
    return Section("scores", "Scores", wide=[chart] if chart else [], tables=list(_score_tables(run.scores)))


def _score_tables(scores: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A table for each set of metrics."""
    groups: dict[tuple[str, ...], list[list[Any]]] = {}
    for task, system, values in score_rows(dict(scores)):
        groups.setdefault(tuple(values), []).append([task, system, *(_score(value) for value in values.values())])
    for metrics, rows in groups.items():
        yield table(["task", "system", *(TITLES.get(metric, metric) for metric in metrics)], rows)


def _score(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else number(value)


def _queries(run: Facts) -> Section:
    groups = []
    for task, examples in run.examples.items():
        for kind, title in KINDS.items():
            chosen = [_example(each) for each in examples if each["kind"] == kind]
            if chosen:
                groups.append({"title": f"{task}: {title}", "examples": chosen, "open": False})
    if not groups:
        return Section("queries", "Queries", "There are no examples of queries, because no retrieval task was scored.")
    return Section("queries", "Queries", "What was expected and what the model found.", queries=groups)


def _example(each: Mapping[str, Any]) -> dict[str, Any]:
    scores = [f"{each['model']:.3f}", *([f"BM25 {each['bm25']:.3f}"] if "bm25" in each else [])]
    found = [{**one, "score": f"{one['score']:.3f}"} for one in each["found"]]
    return {"query": each["query"], "scores": ", ".join(scores), "expected": each["expected"], "found": found}


def _map(run: Facts) -> Section:
    if not run.map:
        text = "There is no map of the vectors: python jobs/map.py draws one, and python jobs/report.py adds it here."
        return Section("map", "Map", text)
    return Section("map", "Map", map=map_content(run.map))


def map_content(drawn: Mapping[str, Any]) -> dict[str, Any]:
    """A map for the template, from what map.json says."""
    note = (
        f"{drawn['title']}. Points close together have similar vectors; distances between clusters and their sizes "
        "mean little. Scroll to zoom, drag to move."
    )
    return {"data": {name: drawn[name] for name in ("points", "clusters", "sources", "centres")}, "note": note}


def _about(run: Facts) -> Section:
    versions = {"python": run.run.get("python"), **run.run.get("versions", {}), "commit": run.run.get("git_sha")}
    facts = [[name, str(value)] for name, value in versions.items() if value]
    if run.manifest:
        facts.append(["data fingerprint", run.manifest.fingerprint])
    tables = [table(["", ""], facts)] if facts else []
    if run.jobs:
        rows = [
            [
                each["began"][:16].replace("T", " "),
                each["command"],
                each["status"],
                duration(each["seconds"]),
                ", ".join(f"{name} {duration(taken)}" for name, taken in each["stages"].items()),
                _hardware(each["hardware"]),
            ]
            for each in run.jobs
        ]
        tables.append(table(["began, UTC", "command", "", "took", "of which", "hardware"], rows))
    config = block(yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True))
    return Section("config", "Config and machine", tables=tables, details=[{"title": "config", "text": config}])


def _hardware(found: Mapping[str, Any]) -> str:
    memory = f"{found['memory_bytes'] / 2**30:.0f} GiB" if found.get("memory_bytes") else ""
    parts = (found.get("cluster"), found.get("processor"), memory, ", ".join(found.get("accelerators", [])))
    return ", ".join(str(part) for part in parts if part)


def _stage_seconds(runs: Sequence[Facts]) -> dict[str, dict[str, float]]:
    """Run → stage → seconds of all jobs, for stages of a second or more."""
    found: dict[str, dict[str, float]] = {}
    for run in runs:
        stages = found.setdefault(run.name, {})
        for job in run.jobs:
            for name, taken in job["stages"].items():
                stages[name] = stages.get(name, 0.0) + taken
    return {run: {name: taken for name, taken in stages.items() if taken >= 1} for run, stages in found.items()}


def comparison(runs: Sequence[Facts]) -> Page:
    """Several runs beside each other."""
    names = [run.name for run in runs]
    rows = [
        [
            run.name,
            sum(source.rows_kept for source in run.manifest.sources) if run.manifest else None,
            _step(run),
            duration(sum(_stage_seconds([run]).get(run.name, {}).values())) if run.jobs else "–",
            run.run.get("git_sha", "")[:12] if run.run.get("git_sha") else "–",
        ]
        for run in runs
    ]
    summary = Section(
        "summary",
        "Summary",
        verdicts=[each for run in runs for each in _verdicts(run, f"{run.name}: ")],
        tables=[table(["run", "records", "steps", "time of all stages", "commit"], rows)],
    )
    differing = list(_differences(runs))
    settings = Section(
        "settings",
        "Settings that differ",
        "" if differing else "The runs have the same settings.",
        tables=[table(["key", *names], differing)] if differing else [],
    )
    scored = [(task, system, metric) for run in runs for task, system, values in _all_scores(run) for metric in values]
    values = [{(task, system): found for task, system, found in _all_scores(run)} for run in runs]
    score_lines = [
        [
            task,
            system,
            TITLES.get(metric, metric),
            *(_score(each.get((task, system), {}).get(metric)) for each in values),
        ]
        for task, system, metric in dict.fromkeys(scored)
    ]
    chart = score_chart(runs)
    scores = Section(
        "scores",
        "Scores",
        "" if score_lines else "None of the runs has scores yet: python jobs/evaluate.py makes them.",
        wide=[chart] if chart else [],
        tables=[table(["task", "system", "metric", *names], score_lines)] if score_lines else [],
    )
    training = Section("training", "Training", charts=training_charts(runs))
    subtitle = f"{len(runs)} runs; validation is dotted, BM25 dashed"
    return Page(textwrap.shorten(", ".join(names), 120), subtitle, [summary, settings, scores, training], [], names)


def _all_scores(run: Facts) -> Iterator[tuple[str, str, dict[str, Any]]]:
    return score_rows(run.scores)


def _differences(runs: Sequence[Facts]) -> Iterator[list[str]]:
    """Keys of the config whose values differ, with the value of each run."""
    flat = [flatten(run.settings) for run in runs]
    for key in dict.fromkeys(key for each in flat for key in each):
        values = [one_line(str(each.get(key, "–")), EXCERPT_CHARS) for each in flat]
        if len(set(values)) > 1 and key not in ("storage.run", "logging.save_dir"):
            yield [key, *values]
