"""What `jobs/embed.py` does, on a Ray session: bring a store up to date, estimate that, or look whether it is.

space = Space.of(config, prepared_folder, manifest, model)
if not space.is_done():
    metrics = bring_up_to_date(space, board)
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.compute as pc
import torch

from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.embedding.encode import TextEncoder, open_encoder
from pipeline.embedding.recipe import EncoderRecipe
from pipeline.embedding.store import file_name, is_embedded, mark_embedded, open_store, open_sync, publish, recipe_of
from pipeline.embedding.stores.budget import Budget
from pipeline.embedding.stores.dead_letters import DeadLetters
from pipeline.embedding.stores.store import Store
from pipeline.embedding.sync import COUNTS, Span, Sync, spans
from pipeline.embedding.verify import Findings, verify
from pipeline.runtime.console import log
from pipeline.runtime.job import JobError, alone_in
from pipeline.runtime.session import Board
from pipeline.storage.files import matching, remove_folder
from pipeline.storage.path import StoragePath

WRITERS = {"lancedb": 1, "parquet": 2, "pinecone": 4}  # at once; commits to one LanceDB table wait for each other
MEASURED_FOR_S = 2.0  # encoding, for an estimate of a rate


@dataclass(frozen=True)
class Space:
    """A prepared data set, a model, and the store that its vectors are in."""

    config: Config
    prepared: StoragePath
    manifest: Manifest
    recipe: EncoderRecipe
    store: Store

    @classmethod
    def of(cls, config: Config, prepared: StoragePath, manifest: Manifest, model: StoragePath) -> Space:
        """Raises ConfigError for what the model or this machine cannot do."""
        recipe = recipe_of(config, model)
        return cls(config, prepared, manifest, recipe, open_store(config, recipe))

    @property
    def folder(self) -> StoragePath:
        return self.config.run_dir / "embedded"

    @property
    def files(self) -> list[Span]:
        return spans(matching(self.prepared / "records", "*.parquet"))

    @property
    def records(self) -> int:
        return sum(source.rows_kept for source in self.manifest.sources)

    def is_done(self) -> bool:
        return is_embedded(self.config, self.prepared, self.store)

    def sync(self, *, make: bool = True) -> Sync:
        return open_sync(self.config, self.manifest, self.recipe, self.store, make=make)


def bring_up_to_date(space: Space, board: Board) -> dict[str, Any]:
    """Embed, write and delete what has to be; compare; let readers use the table. Returns the counts.

    Raises JobError where rows were refused, or the store is not what it should be afterwards.
    """
    from pipeline.embedding.embed import SharedAccount, embed, tidy

    config = space.config
    if config.embedding.store == "pinecone":
        account = SharedAccount(config.pinecone.requests_per_second, config.pinecone.max_concurrency)
        space = replace(space, store=open_store(config, space.recipe, Budget(account)))
    store = space.store
    with alone_in(space.folder):
        sync, letters = space.sync(), DeadLetters(config.run_dir / "dead_letters" / file_name(store), store.width)
        remove_folder(letters.folder)  # they are tried again now
        counts = embed(sync, space.recipe, space.files, space.records, letters, board, WRITERS[config.embedding.store])
        log.info("embed: %s", _listed(counts) or "nothing had changed")
        log.info("embed: joins the files of %s, and indexes them where they are many", store.name)
        facts = tidy(sync, config.embedding.cache_gb * 1e9, config.scaling.labels.data)
        if "recall@10" in facts:
            log.info("embed: recall@10 of the index is %.4f", facts["recall@10"])
        if counts["refused"]:
            raise JobError(
                f"{store.name} refused {counts['refused']:,} rows; {letters.folder} has them with the reasons, all "
                "others are written, and the next run tries just those"
            )
        found = _verified(space, sync)
        mark_embedded(config, space.prepared, store)
        publish(config, space.recipe, store)
    return {**{name: counts[name] for name in COUNTS}, "rows": found.rows, "verified": found.sampled}


def look(space: Space) -> dict[str, Any]:
    """Compare counts, and a sample read back. Raises JobError where something is not as it should be."""
    with alone_in(space.folder):
        found = _verified(space, space.sync(make=False))
    return {"rows": found.rows, "verified": found.sampled, "least_cosine": round(found.least_cosine, 6)}


def _verified(space: Space, sync: Sync) -> Findings:
    found = verify(sync, space.files, open_encoder(space.recipe), space.config.embedding.verify_sample)
    log.info("embed: %s", found)
    if found.wrong:
        raise JobError(
            f"{space.store.name} is not what the records say: {'; '.join(found.wrong)}; python jobs/embed.py writes "
            "what is missing, and another storage.run a table that is whole"
        )
    return found


def estimate(space: Space, board: Board) -> dict[str, Any]:
    """What an embedding would do, and about how long its encoding would take on this cluster. Writes no vector."""
    from pipeline.embedding.embed import plan, pool_of, write_rows

    wanted = space.config.embedding
    pool = pool_of(space.records, space.recipe)
    with alone_in(space.folder):
        sync, files = space.sync(make=False), space.files
        counts = plan(sync, space.recipe, files, board)
        rate = _tokens_per_s(space, sync, files, pool.threads) if counts["tokens"] else 1.0
    seconds = counts["tokens"] / (rate * pool.most)
    rows = space.config.pinecone.batch_rows if wanted.store == "pinecone" else write_rows(space.records)
    writes = counts["new"] + counts["changed"] + counts["metadata"]
    requests = -(-writes // rows) + -(-counts["deleted"] // rows)
    log.info(
        "embed: %s; it would take about %s minutes on %s workers, and %s writes",
        _listed(counts) or "nothing has changed",
        f"{seconds / 60:.1f}",
        pool.most,
        f"{requests:,}",
    )
    return {**counts, "requests": requests, "minutes": round(seconds / 60, 2)}


def _tokens_per_s(space: Space, sync: Sync, files: list[Span], threads: int) -> float:
    """Of this process, with an encoding actor's threads, on texts that are to be encoded."""
    before = torch.get_num_threads()
    try:
        return _measured(sync, files, open_encoder(space.recipe, threads))
    finally:
        torch.set_num_threads(before)


def _measured(sync: Sync, files: list[Span], encoder: TextEncoder) -> float:
    for span in files:
        for rows in sync.due(span, Counter()):
            ready = sync.ready(rows, encoder.tokenizer)
            texts = ready["tokens"].combine_chunks().drop_null()
            if not len(texts):
                continue
            tokens, start = 0, time.perf_counter()
            for first in range(0, len(texts), 128):
                part = texts[first : first + 128]
                encoder.encode_tokens(part)
                tokens += len(pc.list_flatten(part, recursive=True))
                if time.perf_counter() - start > MEASURED_FOR_S:
                    break
            return tokens / (time.perf_counter() - start)
    return 1.0


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items() if number)
