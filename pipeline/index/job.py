"""Updates, estimates or verifies the vector table, for `tep embed`.

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
from pipeline.core.outcome import JobError, command, job_lock
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
from pipeline.model.folder import read_model_spec

LEAST_COSINE = {"fp32": 0.9999, "bf16": 0.999, "int8": 0.98}
"""Minimum cosine between two encodings of a text in different batches, by precision. Measured with MiniLM on Debian,
2026-11-26: 0.999999, 0.99999 and 0.988 (int8's scales depend on the rest of the batch)."""
MEASURED_FOR_S, MEASURED_ROWS = 2.0, 4_096  # limits of the encoding that an estimate measures
SAMPLED_RANGES = 8
INCOMPLETE = "incomplete"  # tag of a version whose documents do not all have a vector
FAULTS = {
    "new": "missing",
    "changed": "of an older text",
    "metadata": "with other metadata",
    "deleted": "of no document",
    "wrong": "damaged",
}
"""What each count of a difference means after an update."""


@dataclass(frozen=True)
class Index:
    """The vector table of a prepared data set and a model."""

    config: Config
    recipe: EncoderRecipe
    table: VectorTable
    documents: Documents
    prompt: str

    @classmethod
    def of(cls, config: Config, prepared: StoragePath, manifest: Manifest, model: StoragePath) -> Index:
        """Raises ConfigError for settings that the model or this machine does not support."""
        recipe, field = encoder_recipe(config, model), embedded_field(config, manifest)
        prompt = read_model_spec(recipe.local).head.prompt(prompt_name(field))
        use_tokens = tokens_fit(config, prepared, recipe, field, prompt)
        documents = Documents.of(prepared, config.root, manifest, field, use_tokens=use_tokens)
        return cls(config, recipe, table_of(config, recipe), documents, prompt)

    def is_done(self) -> bool:
        """Whether an earlier job verified the newest version of the table for these documents."""
        if not self.table.exists():
            return False
        settings = self.config.embedding
        verified = self.table.is_verified(self.table.open(), self.documents.key)
        indexed = missing_index(self.table, settings.index, settings.index_rows) is None
        return verified and indexed and not unreadable_indexes(self.table)

    def publish(self) -> None:
        publish(self.config, self.recipe, self.table)

    def bring_up_to_date(self, progress: Callable[[], Progress], *, rebuild: bool = False) -> dict[str, Any]:
        """Embed new documents, rewrite changed rows, delete old ones; verify; publish the table. Returns the counts.

        Raises JobError if it would delete too many documents, if texts have no vector, or if verification fails.
        """
        began = time.monotonic()
        self.documents.make(progress)
        if rebuild:
            with job_lock(self.table.path):
                self.table.empty()
        with self.table.writing() as writer:
            metrics = (
                {"embedded": 0, "rows": self.table.count()} if self.is_done() else self._write(writer, progress, began)
            )
            self.publish()
            return metrics | self._deliver(writer, progress)

    def _deliver(self, writer: Writer, progress: Callable[[], Progress]) -> dict[str, Any]:
        """Copy the table's changes to Pinecone or to Parquet files, as the config says."""
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
        log.info("embed: Pinecone is up to date: %s", _listed(counts) or "no changes")
        if pinned := self.table.pinned_bytes():
            log.info("embed: the pushed version keeps %s MB of old files", f"{pinned / 1e6:,.0f}")
        if counts["refused"]:
            raise JobError(
                f"Pinecone refused {counts['refused']:,} rows; see {letters} for the reasons. All other rows were "
                "written; the next run retries the refused ones"
            )
        return {"upserted": counts["upserted"], "pushed_deletions": counts["deleted"]}

    def _write(self, writer: Writer, progress: Callable[[], Progress], began: float) -> dict[str, Any]:
        from pipeline.index.embed import EmbedStats, differences, embed, finish_on_cluster, rewrite

        config = self.config
        writer.begin()
        for name in unreadable_indexes(self.table):
            log.warning("embed: rebuilding the index %s, which cannot be read", name)
            writer.drop_index(name)
        sync = self._sync(check=not writer.was_verified)
        if sync.check and not sync.is_new:
            log.info("embed: checking all rows, because the last job did not finish or another program wrote")
        by_range = differences(sync, progress)
        total = Difference.total(by_range)
        counts = total.summary
        self._refuse_mass_deletion(counts)
        letters = DeadLetters(config.run_dir / "dead_letters" / self.table.name)
        remove_folder(letters.folder)  # these texts are retried now
        due, stats = [index for index, each in enumerate(by_range) if each.counts["new"]], EmbedStats()
        if due:
            stats = embed(sync, self.recipe, due, counts["new"] + counts["changed"], letters, progress(), writer)
        rewrite(sync, [index for index, each in enumerate(by_range) if each.counts["metadata"]], writer)
        writer.delete(total.obsolete)
        log.info("embed: %s", _listed(counts) or "no changes")
        progress()
        index, index_rows = config.embedding.index, config.embedding.index_rows
        facts = finish_on_cluster(self.table, index, index_rows, config.scaling.labels.data)
        verified = self._verified(progress, check=False, missing=stats.refused)
        writer.clean_up()
        writer.mark_verified(INCOMPLETE if stats.refused else self.documents.key)
        if stats.refused:
            self.publish()
            raise JobError(
                f"{stats.refused:,} texts have no vector; see {letters.folder} for the reasons. All other texts are "
                "in the table; the next run retries the refused ones"
            )
        if due:
            log.info("embed: %s", stats.rates(time.monotonic() - began))
        measured = {name: facts[name] for name in ("recall@10",) if name in facts}
        return {"embedded": stats.written, **{name: counts[name] for name in COUNTS}, **verified, **measured}

    def _sync(self, *, check: bool) -> Sync:
        """Compare the documents with the newest version of the table."""
        version = self.table.version() if self.table.exists() and self.table.count() else 0
        return Sync(self.documents, self.table, self.recipe, self.prompt, version, check)

    def _refuse_mass_deletion(self, counts: Counter[str]) -> None:
        """Raise JobError if more than `embedding.max_deleted_fraction` of the documents would be deleted."""
        held = sum(counts[name] for name in COUNTS if name != "new")
        most = self.config.embedding.max_deleted_fraction
        if counts["deleted"] > most * held:
            raise JobError(
                f"{counts['deleted']:,} of {held:,} documents in {self.table.name} are no longer in the data and would "
                f"be deleted, more than embedding.max_deleted_fraction={most:g} allows; check that no source is "
                "missing, or set embedding.max_deleted_fraction=1"
            )

    def verify(self, progress: Callable[[], Progress]) -> dict[str, Any]:
        """Compare all rows with their digests, and encode a sample of texts again to compare the vectors.

        Raises JobError if anything differs.
        """
        self.documents.make(progress)
        try:
            return self._verified(progress, check=True)
        except JobError:
            with suppress(JobError, OSError), self.table.writing() as writer:
                writer.forget_verified()  # makes the next job check and repair all rows
            raise

    def _verified(self, progress: Callable[[], Progress], *, check: bool, missing: int = 0) -> dict[str, Any]:
        """Compare again, and encode a sample. `missing` is the number of texts that may lack a row."""
        from pipeline.index.embed import differences

        counts = Difference.total(differences(self._sync(check=check), progress, "embed: verify")).summary
        counts["new"] -= missing
        wrong = [f"{counts[name]:,} rows are {what}" for name, what in FAULTS.items() if counts[name]]
        sampled, least, off = self._sampled()
        remedy = f"to repair it, run {command('embed')}"
        if off:
            wrong.append(f"{off:,} of {sampled} sampled vectors do not match their texts (lowest cosine {least:.4f})")
            remedy = f"to embed all texts again, run {command('embed')} --rebuild"
        if wrong:
            raise JobError(f"{self.table.path} does not match the data: {', '.join(wrong)}; {remedy}")
        rows = self.table.count()
        log.info("embed: verified %s rows, %s of them by encoding them again", f"{rows:,}", sampled)
        return {"rows": rows, "verified": sampled, "least_cosine": round(least, 6)}

    def _sampled(self) -> tuple[int, float, int]:
        """Encode a sample again. Returns its size, the lowest cosine to stored vectors, and how many are too low."""
        rng, size = np.random.default_rng(0), self.config.embedding.verify_sample
        ranges, tables = rng.permutation(len(self.documents))[: SAMPLED_RANGES if size else 0], []
        for index in ranges.tolist():
            for rows in islice(self.documents.read(index), 1):
                picked = rng.choice(len(rows), min(len(rows), -(-size // len(ranges))), replace=False)
                tables.append(rows.take(np.sort(picked)))
        if not tables:
            return 0, 1.0, 0
        tokenized = self._sync(check=False).tokenized(pa.concat_tables(tables).slice(0, size))
        encoded = encoded_rows(tokenized, open_encoder(self.recipe))
        stored = self.table.fetch(encoded["id"].to_pylist())
        expected = encoded["vector"].take(pc.index_in(stored["id"], one_array(encoded["id"])))
        cosines = (unit(as_matrix(expected)) * unit(as_matrix(stored["vector"]).astype(np.float32))).sum(axis=1)
        exact = self.table.vector_type == "float32"
        least = min(LEAST_COSINE[self.config.embedding.precision], 1.0 if exact else 0.999)
        return len(cosines), float(cosines.min(initial=1.0)), int((cosines < least).sum())

    def estimate(self, progress: Callable[[], Progress]) -> dict[str, Any]:
        """Count what an update would do, and estimate the encoding time on this cluster. Writes no vectors."""
        from pipeline.index.embed import differences
        from pipeline.index.pool import pool_of

        self.documents.make(progress)
        sync = self._sync(check=self.table.exists() and not self.table.is_verified(self.table.open()))
        by_range = differences(sync, progress)
        counts = Difference.total(by_range).summary
        progress()
        pool, due = pool_of(sum(self.documents.rows), self.recipe), counts["new"] + counts["changed"]
        rate, tokens = self._measured(sync, by_range, pool.threads) if due else (1.0, 0.0)
        minutes = due / (rate * pool.most) / 60
        changes = _listed(counts) or "no changes"
        log.info("embed: %s; encoding would take about %.1f minutes on %s workers", changes, minutes, pool.most)
        counted = {name: counts[name] for name in COUNTS}
        return {**counted, "tokens": round(tokens * due), "minutes": round(minutes, 2)}

    def _measured(self, sync: Sync, by_range: list[Difference], threads: int) -> tuple[float, float]:
        """Documents per second of one actor with `threads` threads, and tokens per document, on a sample."""
        index = next(index for index, each in enumerate(by_range) if each.counts["new"])
        rows = next(sync.due(index)).slice(0, MEASURED_ROWS)
        encoder, done, began = open_encoder(self.recipe, threads), 0, time.perf_counter()
        while done < len(rows) and time.perf_counter() - began < MEASURED_FOR_S:
            encoded_rows(rows.slice(done, 128), encoder)
            done += 128
        done = min(done, len(rows))
        return done / (time.perf_counter() - began), count_tokens(rows["tokens"]) / len(rows)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items() if number)
