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
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.embedding.columns import as_matrix
from pipeline.embedding.documents import Documents, tokens_fit
from pipeline.embedding.encode import TextEncoder, open_encoder
from pipeline.embedding.indexing import missing_index, unreadable
from pipeline.embedding.recipe import EncoderRecipe
from pipeline.embedding.store import embedded_field, prompt_name, publish, recipe_of, table_of
from pipeline.embedding.stores.dead_letters import DeadLetters
from pipeline.embedding.sync import COUNTS, Difference, Sync, count_tokens, encoded_rows
from pipeline.embedding.table import VectorTable, Writer
from pipeline.model.reading import read_card
from pipeline.runtime.console import log
from pipeline.runtime.outcome import JobError, alone_in
from pipeline.runtime.session import Progress
from pipeline.storage.files import remove_folder
from pipeline.storage.path import StoragePath

if TYPE_CHECKING:
    from pipeline.embedding.embed import Spent

LEAST_COSINE = {"fp32": 0.9999, "bf16": 0.999, "int8": 0.98}
"""Of a vector to that of the same text among others, by precision. MiniLM on Debian, 2026-11-26: 0.999999, 0.99999 and
0.988, for int8's scales follow from what else is in a batch."""
MEASURED_FOR_S, MEASURED_ROWS = 2.0, 4_096  # encoding, for an estimate of a rate
SAMPLED_RANGES = 8


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
        recipe, field = recipe_of(config, model), embedded_field(config, manifest)
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
        return verified and indexed and not unreadable(self.table)

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
            from pipeline.embedding.stores.snapshot import write_snapshot

            folder = write_snapshot(self.table, config.under_root(config.embedding.uri or "parquet"), progress)
            return {"parquet": str(folder)}
        if store == "lancedb":
            return {}
        from pipeline.embedding.pushing import push_over_cluster
        from pipeline.embedding.stores.push import pinned_bytes

        letters = config.run_dir / "dead_letters" / f"{self.table.name}-pinecone"
        counts = push_over_cluster(writer, config, letters, progress())
        log.info("embed: Pinecone holds the table's rows: %s", _listed(counts) or "nothing had changed")
        if pinned := pinned_bytes(self.table):
            log.info("embed: versions that were pushed keep %s MB of old files", f"{pinned / 1e6:,.0f}")
        if counts["refused"]:
            raise JobError(
                f"Pinecone refused {counts['refused']:,} rows; {letters} has them with the reasons, all others are "
                "there, and the next run tries just those"
            )
        return {"upserted": counts["upserted"], "pushed_deletions": counts["deleted"]}

    def _write(self, writer: Writer, progress: Callable[[], Progress], began: float) -> dict[str, Any]:
        from pipeline.embedding.embed import differences, embed, finish_somewhere, rewrite

        wanted = self.config.embedding
        writer.begin()
        for name in unreadable(self.table):
            log.warning("embed: the index %s cannot be read and is built again", name)
            writer.drop_index(name)
        rows = writer.dataset.count_rows()
        sync = self._sync(int(writer.dataset.version), empty=not rows, check=not writer.was_verified)
        if rows and sync.check:
            log.info("embed: checks all %s rows: the last job did not finish, or something else wrote", f"{rows:,}")
        found = differences(sync, progress)
        whole = Difference.total(found)
        counts = whole.summary
        self._refuse_mass_deletion(counts)
        letters = DeadLetters(self.config.run_dir / "dead_letters" / self.table.name)
        remove_folder(letters.folder)  # they are tried again now
        metrics: dict[str, Any] = {name: counts[name] for name in COUNTS}
        due = [index for index, each in enumerate(found) if each.counts["new"]]
        spent = None
        if due:
            spent = embed(sync, self.recipe, due, counts["new"] + counts["changed"], letters, progress(), writer)
            metrics |= {"embedded": spent.written, "refused": spent.refused}
        rewrite(sync, [index for index, each in enumerate(found) if each.counts["metadata"]], writer)
        writer.delete(whole.obsolete)
        log.info("embed: %s", _listed(counts) or "nothing had changed")
        progress()
        facts = finish_somewhere(self.table, wanted.index, wanted.index_rows, self.config.scaling.labels.data)
        without_vector = spent.refused if spent else 0
        verified = self._verified(progress, check=False, missing=without_vector)
        writer.clean_up()
        writer.mark_verified(INCOMPLETE if without_vector else self.documents.key)
        if without_vector:
            self.publish()
            raise JobError(
                f"{without_vector:,} texts have no vector; {letters.folder} has them with the reasons, all others are "
                "in the table, and the next run tries just those"
            )
        if spent:
            _log_rate(spent, time.monotonic() - began)
        return {
            "embedded": 0,
            **metrics,
            **verified,
            **({"recall@10": facts["recall@10"]} if "recall@10" in facts else {}),
        }

    def _sync(self, version: int, *, empty: bool, check: bool) -> Sync:
        return Sync(self.documents, self.table, self.recipe, self.prompt, version, empty, check)

    def _refuse_mass_deletion(self, counts: Counter[str]) -> None:
        held, most = sum(counts[name] for name in HELD), self.config.embedding.max_deleted_fraction
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
        """`missing` texts may be, because they have no vector."""
        from pipeline.embedding.embed import differences

        dataset = self.table.open()
        sync = self._sync(int(dataset.version), empty=not dataset.count_rows(), check=check)
        counts = Difference.total(differences(sync, progress, "embed: verify")).summary
        counts["new"] -= missing
        wrong = [f"{counts[name]:,} rows are {what}" for name, what in WRONG.items() if counts[name]]
        sampled, least, off = self._sampled()
        remedy = "python jobs/embed.py repairs it"
        if off:
            wrong.append(f"{off:,} of {sampled} sampled vectors are not those of their texts, at cosine {least:.4f}")
            remedy = "python jobs/embed.py --rebuild embeds all texts again"
        if wrong:
            raise JobError(f"{self.table.path} is not what the data say: {', '.join(wrong)}; {remedy}")
        log.info("embed: %s rows are verified, %s of them by encoding them again", f"{dataset.count_rows():,}", sampled)
        return {"rows": dataset.count_rows(), "verified": sampled, "least_cosine": round(least, 6)}

    def _sampled(self) -> tuple[int, float, int]:
        """Vectors that were encoded anew, the least cosine to those in the table, and how many are below the bound."""
        chance, size = np.random.default_rng(0), self.config.embedding.verify_sample
        drawn = chance.permutation(len(self.documents))[: SAMPLED_RANGES if size else 0]
        tables = []
        for index in drawn.tolist():
            rows = next(self.documents.read(index), None)
            if rows is not None:
                tables.append(
                    rows.take(np.sort(chance.choice(len(rows), min(len(rows), -(-size // len(drawn))), False)))
                )
        if not tables:
            return 0, 1.0, 0
        sync = self._sync(0, empty=True, check=False)
        ours = encoded_rows(sync.tokenized(pa.concat_tables(tables).slice(0, size)), self._encoder)
        there = self.table.fetch(ours["id"].to_pylist())
        at = {row_id: i for i, row_id in enumerate(ours["id"].to_pylist())}
        expected = as_matrix(ours["vector"])[[at[row_id] for row_id in there["id"].to_pylist()]]
        found = as_matrix(there["vector"]).astype(np.float32)
        lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
        cosines = (expected * found).sum(axis=1) / np.maximum(lengths, 1e-12)
        least = min(
            LEAST_COSINE[self.config.embedding.precision], 1.0 if self.table.vector_type == "float32" else 0.999
        )
        return len(found), float(cosines.min(initial=1.0)), int((cosines < least).sum())

    @cached_property
    def _encoder(self) -> TextEncoder:
        return open_encoder(self.recipe)

    def estimate(self, progress: Callable[[], Progress]) -> dict[str, Any]:
        """What an embedding would do, and about how long encoding would take on this cluster. Writes no vector."""
        from pipeline.embedding.embed import differences, pool_of

        self.documents.make(progress)
        exists, documents = self.table.exists(), sum(self.documents.rows)
        rows = self.table.count() if exists else 0
        sync = self._sync(
            self.table.version() if exists else 0,
            empty=not rows,
            check=exists and not self.table.is_verified(self.table.open()),
        )
        found = differences(sync, progress)
        counts = Difference.total(found).summary
        progress()
        pool = pool_of(documents, self.recipe)
        due = counts["new"] + counts["changed"]
        rate, tokens = self._measured(sync, found, pool.threads) if due else (1.0, 0.0)
        seconds = due / (rate * pool.most)
        log.info(
            "embed: %s; encoding would take about %.1f minutes on %s workers",
            _listed(counts) or "nothing has changed",
            seconds / 60,
            pool.most,
        )
        return {
            **{name: counts[name] for name in COUNTS},
            "tokens": round(tokens * due),
            "minutes": round(seconds / 60, 2),
        }

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


HELD = ("changed", "metadata", "untouched", "deleted")  # counts that make up the documents of a table


def _log_rate(spent: Spent, seconds: float) -> None:
    """How fast the whole job was, and what the time of all processes went to."""
    log.info(
        "embed: %s vectors in %s commits, %.1f s, %s a second, %s tokens a second; of all processes %s",
        f"{spent.written:,}",
        f"{spent.commits:,}",
        seconds,
        f"{spent.written / seconds:,.0f}",
        f"{spent.tokens / seconds:,.0f}",
        ", ".join(f"{name} {spent.seconds.get(name, 0.0):.1f} s" for name in PARTS),
    )


INCOMPLETE = "incomplete"  # in place of the documents' key
PARTS = ("read", "encode", "write", "commit")
WRONG = {
    "new": "missing",
    "changed": "of an older text",
    "metadata": "with other metadata",
    "deleted": "foreign",
    "wrong": "damaged",
}


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items() if number)
