"""Find the records nearest to a question by meaning.

examples:
  python jobs/search.py "remove duplicate rows from a table"
  python jobs/search.py "parse a date" --limit 3 --json
  python jobs/search.py --config configs/pairs.yaml "a command-line tool for JSON"
  python jobs/search.py "parse a date" --where source=packages --where 'line>=100'
  python jobs/search.py "parse a date" --hybrid
"""

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import Config, ConfigError
from pipeline.runtime.job import JobError, Result, parser, run_job

MAX_QUERY_CHARS = 10_000


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
    query = checked(args.query)
    if args.limit < 1:
        raise ConfigError(f"--limit: found {args.limit}; allowed is 1 or more")
    from pipeline.embedding.stores.where import parse

    where = parse(args.where)
    from pipeline.data.judging import normaliser
    from pipeline.embedding.encode import open_encoder
    from pipeline.embedding.store import open_store, published_model, recipe_of
    from pipeline.embedding.stores.store import HybridStore
    from pipeline.stages import model_folder

    recipe = recipe_of(config, published_model(config) or model_folder(config))
    store = open_store(config, recipe)
    if args.hybrid and not isinstance(store, HybridStore):
        raise ConfigError(f"--hybrid: found embedding.store={config.embedding.store}; allowed with it is lancedb alone")
    if not store.exists():
        raise JobError(f"no index yet for the model in {recipe.folder}; python jobs/embed.py makes one")
    text = normaliser(config.data)(query)
    vector = open_encoder(recipe, device="cpu").encode([text], "query")[0]
    find = partial(store.hybrid, text) if isinstance(store, HybridStore) and args.hybrid else store.query
    found = find(vector, args.limit, where)
    results = [
        {"rank": rank, **{key: row[key] for key in ("score", "id", "source_id", "text")}, "metadata": row["metadata"]}
        for rank, row in enumerate(found, 1)
    ]
    for result in results:
        result["metadata"] = json.loads(result["metadata"])
        result["score"] = round(result["score"], 4)
    if args.json:
        return Result(reply=results)
    print("\n".join(line(result) for result in results))
    return Result({"results": len(results)}, {"store": store.uri, "table": store.name})


def checked(query: str) -> str:
    if not query.strip():
        raise ConfigError("query: found nothing; allowed are words to look for")
    if len(query) > MAX_QUERY_CHARS:
        raise ConfigError(f"query: found {len(query):,} characters; allowed are at most {MAX_QUERY_CHARS:,}")
    return query


def line(result: dict[str, Any]) -> str:
    """Rank, score, where it stands, and how it begins."""
    metadata = result["metadata"]
    place = f"{metadata['file']}:{metadata['line']}" if {"file", "line"} <= metadata.keys() else result["source_id"]
    begins = " ".join(result["text"].split())
    width = shutil.get_terminal_size((120, 24)).columns
    return f"{result['rank']:>2}  {result['score']:.3f}  {place}  {metadata.get('name', '')}\n    {begins[: width - 4]}"


if __name__ == "__main__":
    sys.exit(run_job("search", __doc__ or "", main, arguments()))
