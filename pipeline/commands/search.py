"""Search the index by meaning.

examples:
  tep search "remove duplicate rows from a table"
  tep search "parse a date" --limit 3 --json
  tep search --config pairs "a command-line tool for JSON"
  tep search "parse a date" --where source=packages --where 'line>=100'
  tep search "parse a date" --hybrid
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.core.console import log
from pipeline.core.escaping import printable
from pipeline.core.outcome import Result
from pipeline.job import parser

if TYPE_CHECKING:
    from pipeline.index.search import Hit


def arguments() -> argparse.ArgumentParser:
    own = parser("search", __doc__ or "", query=True, prepares=False)
    own.add_argument("--limit", type=int, default=10, metavar="N", help="results to show (default: %(default)s)")
    own.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="records whose source, source_id or metadata has this value, one of [a, b], or is >=, >, <=, < a number",
    )
    own.add_argument("--hybrid", action="store_true", help="rank by words as well as by meaning (LanceDB)")
    own.add_argument("--json", action="store_true", help="print [{rank, score, id, source_id, text, metadata}]")
    return own


def main(config: Config, args: argparse.Namespace) -> Result:
    from pipeline.evaluation.report import hybrid_verdict, read_scores
    from pipeline.index.search import search
    from pipeline.index.where import parse

    found = search(config, args.query, args.limit, parse(args.where), hybrid=args.hybrid)
    if args.json:
        results = [{**asdict(hit), "score": round(hit.score, 4)} for hit in found]
        return Result(reply=[{**each, "score_type": "fusion"} for each in results] if args.hybrid else results)
    if args.hybrid and (worse := hybrid_verdict(read_scores(config.run_dir))):
        log.warning("%s", worse)
    if args.hybrid:
        print("scores are sums of 1 / (60 + rank) over the rankings by meaning and by words")
    if found:
        print("\n".join(map(line, found)))
    return Result({"results": len(found)}, summary="")


def line(hit: Hit) -> str:
    """Rank, score, where it stands, and how it begins: two lines of printable characters."""
    metadata = hit.metadata
    place = f"{metadata['file']}:{metadata['line']}" if {"file", "line"} <= metadata.keys() else hit.source_id
    begins = printable(" ".join(hit.text.split()))
    width = shutil.get_terminal_size((120, 24)).columns
    first = printable(f"{hit.rank:>2}  {hit.score:.3f}  {place}  {metadata.get('name', '')}")
    return f"{first}\n    {begins[: width - 4]}"
