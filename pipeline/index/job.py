"""What `jobs/embed.py` does: bring the vector table up to date, estimate that, or verify it.

index = Index.of(config, prepared_folder, manifest, model)
if not index.is_done():
    metrics = index.bring_up_to_date(session.progress)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.core.console import log
from pipeline.core.files import remove_folder
from pipeline.core.outcome import JobError, alone_in
from pipeline.core.path import StoragePath
from pipeline.core.session import Progress
from pipeline.data.manifest import Manifest
from pipeline.index.dead_letters import DeadLetters
from pipeline.index.documents import Documents, tokens_fit
from pipeline.index.encoder import EncoderRecipe, open_encoder
from pipeline.index.indexing import missing_index, unreadable_indexes
from pipeline.index.published import embedded_field, encoder_recipe, prompt_name, publish, table_of
from pipeline.index.sync import COUNTS, Difference, Sync, count_tokens, encoded_rows
from pipeline.index.table import VectorTable
from pipeline.index.vectors import as_matrix, one_array, unit
from pipeline.index.writer import Writer
from pipeline.model.folder import read_card

LEAST_COSINE = {"fp32": 0.9999, "bf16": 0.999, "int8": 0.98}
"""Of a vector to that of the same text among others, by precision. MiniLM on Debian, 2026-11-26: 0.999999, 0.99999 and
0.988, for int8's scales follow from what else is in a batch."""
MEASURED_FOR_S, MEASURED_ROWS = 2.0, 4_096  # encoding, for an estimate of a rate
SAMPLED_RANGES = 8
INCOMPLETE = "incomplete"  # in place of the documents' key
WRONG = {
    "new": "missing",
    "changed": "of an older text",
    "metadata": "with other metadata",
    "deleted": "foreign",
    "wrong": "damaged",
}
"""What a difference means once the table should be complete."""


@dataclass(frozen=True)
class Index:
    """A prepared data set, a model, and the table of its vectors."""

    config: Config
    recipe: EncoderRecipe
    table: VectorTable
    documents: Documents
    prompt: str

    @classmethod
    def of(cls, config: Config, prepared: StoragePath, manifest: Manifest, model: StoragePath) -> Index:
        """Raises ConfigError for what the model or this machine cannot do."""
        recipe, field = encoder_recipe(config, model), embedded_field(config, manifest)
        prompt = read_card(recipe.local).head.prompt(prompt_name(field))
        use_tokens = tokens_fit(config, prepared, recipe, field, prompt)
        documents = Documents.of(prepared, config.root, manifest, field, use_tokens=use_tokens)
        return cls(config, recipe, table_of(config, recipe), documents, prompt)

    def is_done(self) -> bool:
        """Whether the newest version of the table is the one that an earlier job verified for these documents."""
        if not self.table.exists():
            return False
        wanted = self.config.embedding
        verified = self.table.is_verified(self.table.open(), self.documents.key)
        indexed = missing_index(self.table, wanted.index, wanted.index_rows) is None
        return verified and indexed and not unreadable_indexes(self.table)

    def publish(self) -> None:
        publish(self.config, self.recipe, self.table)

    def bring_up_to_date(self, progress: Callable[[], Progress], *, rebuild: bool = False) -> dict[str, Any]:
        """Embed, rewrite and delete what has to be; verify; let readers use the table. Returns the counts.

        Raises JobError where more would be deleted than is allowed, texts have no vector, or the table is not what it
        should be afterwards.
        """
        began = time.monotonic()
        self.documents.make(progress)
        if rebuild:
            with alone_in(self.table.path):
                self.table.empty()
        with self.table.writing() as writer:
            metrics = (
                {"embedded": 0, "rows": self.table.count()} if self.is_done() else self._write(writer, progress, began)
            )
            self.publish()
            return metrics | self._deliver(writer, progress)

    def _deliver(self, writer: Writer, progress: Callable[[], Progress]) -> dict[str, Any]:
        """Bring what lies beside the table up to date: a namespace of Pinecone, or Parquet files."""
        config, store = self.config, self.config.embedding.store
        if store == "parquet":
            from pipeline.index.snapshot import write_snapshot

            folder = write_snapshot(self.table, config.under_root(config.embedding.uri or "parquet"), progress)
            return {"parquet": str(folder)}
        if store == "lancedb":
            return {}
        from pipeline.index.push import push_over_cluster

        letters = config.run_dir / "dead_letters" / f"{self.table.name}-pinecone"
        counts = push_over_cluster(writer, config, letters, progress())
        log.info("embed: Pinecone holds the table's rows: %s", _listed(counts) or "nothing had changed")
        if pinned := self.table.pinned_bytes():
            log.info("embed: versions that were pushed keep %s MB of old files", f"{pinned / 1e6:,.0f}")
        if counts["refused"]:
            raise JobError(
                f"Pinecone refused {counts['refused']:,} rows; {letters} has them with the reasons, all others are "
                "there, and the next run tries just those"
            )
        return {"upserted": counts["upserted"], "pushed_deletions": counts["deleted"]}

    def _write(self, writer: Writer, progress: Callable[[], Progress], began: float) -> dict[str, Any]:
        from pipeline.index.embed import Spent, differences, embed, finish_on_cluster, rewrite

        config = self.config
        writer.begin()
        for name in unreadable_indexes(self.table):
            log.warning("embed: the index %s cannot be read and is built again", name)
            writer.drop_index(name)
        sync = self._sync(check=not writer.was_verified)
        if sync.check and not sync.is_new:
            log.info("embed: checks all rows, because the last job did not finish, or something else wrote")
        found = differences(sync, progress)
        whole = Difference.total(found)
        counts = whole.summary
        self._refuse_mass_deletion(counts)
        letters = DeadLetters(config.run_dir / "dead_letters" / self.table.name)
        remove_folder(letters.folder)  # they are tried again now
        due, spent = [index for index, each in enumerate(found) if each.counts["new"]], Spent()
        if due:
            spent = embed(sync, self.recipe, due, counts["new"] + counts["changed"], letters, progress(), writer)
        rewrite(sync, [index for index, each in enumerate(found) if each.counts["metadata"]], writer)
        writer.delete(whole.obsolete)
        log.info("embed: %s", _listed(counts) or "nothing had changed")
        progress()
        index, index_rows = config.embedding.index, config.embedding.index_rows
        facts = finish_on_cluster(self.table, index, index_rows, config.scaling.labels.data)
        verified = self._verified(progress, check=False, missing=spent.refused)
        writer.clean_up()
        writer.mark_verified(INCOMPLETE if spent.refused else self.documents.key)
        if spent.refused:
            self.publish()
            raise JobError(
                f"{spent.refused:,} texts have no vector; {letters.folder} has them with the reasons, all others are "
                "in the table, and the next run tries just those"
            )
        if due:
            log.info("embed: %s", spent.rates(time.monotonic() - began))
        measured = {name: facts[name] for name in ("recall@10",) if name in facts}
        return {"embedded": spent.written, **{name: counts[name] for name in COUNTS}, **verified, **measured}

    def _sync(self, *, check: bool) -> Sync:
        """The documents, and the newest version of the table."""
        version = self.table.version() if self.table.exists() and self.table.count() else 0
        return Sync(self.documents, self.table, self.recipe, self.prompt, version, check)

    def _refuse_mass_deletion(self, counts: Counter[str]) -> None:
        """Stop where more documents would be deleted than is allowed."""
        held = sum(counts[name] for name in COUNTS if name != "new")
        most = self.config.embedding.max_deleted_fraction
        if counts["deleted"] > most * held:
            raise JobError(
                f"{counts['deleted']:,} of {held:,} documents in {self.table.name} would be deleted, because the data "
                f"no longer have them, and embedding.max_deleted_fraction={most:g} allows fewer; check that no source "
                "is missing, or allow it with embedding.max_deleted_fraction=1"
            )

    def verify(self, progress: Callable[[], Progress]) -> dict[str, Any]:
        """Compare all ids, texts, metadata and vectors with their digests, and a sample of vectors with their texts.

        Raises JobError where something is not as it should be.
        """
        self.documents.make(progress)
        try:
            return self._verified(progress, check=True)
        except JobError:
            with suppress(JobError, OSError), self.table.writing() as writer:
                writer.forget_verified()  # so that the next job checks and repairs all rows
            raise

    def _verified(self, progress: Callable[[], Progress], *, check: bool, missing: int = 0) -> dict[str, Any]:
        """Compare once more, and a sample of vectors. `missing` texts have no vector, so their rows may be missing."""
        from pipeline.index.embed import differences

        counts = Difference.total(differences(self._sync(check=check), progress, "embed: verify")).summary
        counts["new"] -= missing
        wrong = [f"{counts[name]:,} rows are {what}" for name, what in WRONG.items() if counts[name]]
        sampled, least, off = self._sampled()
        remedy = "python jobs/embed.py repairs it"
        if off:
            wrong.append(f"{off:,} of {sampled} sampled vectors are not those of their texts, at cosine {least:.4f}")
            remedy = "python jobs/embed.py --rebuild embeds all texts again"
        if wrong:
            raise JobError(f"{self.table.path} is not what the data say: {', '.join(wrong)}; {remedy}")
        rows = self.table.count()
        log.info("embed: %s rows are verified, %s of them by encoding them again", f"{rows:,}", sampled)
        return {"rows": rows, "verified": sampled, "least_cosine": round(least, 6)}

    def _sampled(self) -> tuple[int, float, int]:
        """Encode a sample again. Returns its size, the lowest cosine to stored vectors, and how many are too low."""
        chance, size = np.random.default_rng(0), self.config.embedding.verify_sample
        drawn, tables = chance.permutation(len(self.documents))[: SAMPLED_RANGES if size else 0], []
        for index in drawn.tolist():
            for rows in islice(self.documents.read(index), 1):
                some = chance.choice(len(rows), min(len(rows), -(-size // len(drawn))), replace=False)
                tables.append(rows.take(np.sort(some)))
        if not tables:
            return 0, 1.0, 0
        tokenized = self._sync(check=False).tokenized(pa.concat_tables(tables).slice(0, size))
        ours = encoded_rows(tokenized, open_encoder(self.recipe))
        there = self.table.fetch(ours["id"].to_pylist())
        expected = ours["vector"].take(pc.index_in(there["id"], one_array(ours["id"])))
        cosines = (unit(as_matrix(expected)) * unit(as_matrix(there["vector"]).astype(np.float32))).sum(axis=1)
        exact = self.table.vector_type == "float32"
        least = min(LEAST_COSINE[self.config.embedding.precision], 1.0 if exact else 0.999)
        return len(cosines), float(cosines.min(initial=1.0)), int((cosines < least).sum())

    def estimate(self, progress: Callable[[], Progress]) -> dict[str, Any]:
        """What an embedding would do, and about how long encoding would take on this cluster. Writes no vector."""
        from pipeline.index.embed import differences
        from pipeline.index.pool import pool_of

        self.documents.make(progress)
        sync = self._sync(check=self.table.exists() and not self.table.is_verified(self.table.open()))
        found = differences(sync, progress)
        counts = Difference.total(found).summary
        progress()
        pool, due = pool_of(sum(self.documents.rows), self.recipe), counts["new"] + counts["changed"]
        rate, tokens = self._measured(sync, found, pool.threads) if due else (1.0, 0.0)
        minutes = due / (rate * pool.most) / 60
        changes = _listed(counts) or "nothing has changed"
        log.info("embed: %s; encoding would take about %.1f minutes on %s workers", changes, minutes, pool.most)
        counted = {name: counts[name] for name in COUNTS}
        return {**counted, "tokens": round(tokens * due), "minutes": round(minutes, 2)}

    def _measured(self, sync: Sync, found: list[Difference], threads: int) -> tuple[float, float]:
        """Documents a second of an encoding actor with so many threads, and tokens a document, on some that are due."""
        index = next(index for index, each in enumerate(found) if each.counts["new"])
        rows = next(sync.due(index)).slice(0, MEASURED_ROWS)
        encoder, done, began = open_encoder(self.recipe, threads), 0, time.perf_counter()
        while done < len(rows) and time.perf_counter() - began < MEASURED_FOR_S:
            encoded_rows(rows.slice(done, 128), encoder)
            done += 128
        done = min(done, len(rows))
        return done / (time.perf_counter() - began), count_tokens(rows["tokens"]) / len(rows)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items() if number)
