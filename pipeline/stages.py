"""The stages that jobs are made of: each brings one thing up to date, or finds that it is.

A stage takes a `Session`, which starts Ray when the first stage that has work asks for it, so that a rerun of finished
work does without.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pipeline.config import Config, ConfigError
from pipeline.data.judging import normaliser
from pipeline.data.manifest import Manifest
from pipeline.data.prepare import prepare
from pipeline.evaluation.beir import check_beir
from pipeline.evaluation.sts import read_sts
from pipeline.runtime.console import Stage, log, table
from pipeline.runtime.files import fetched, write_atomically
from pipeline.runtime.job import JobError, Result, alone_in
from pipeline.runtime.root import check_writable
from pipeline.runtime.session import Board, ray_session, set_environment
from pipeline.storage.bucket import AnyPath, as_path


class Session:
    """A job's Ray session, started on first use."""

    def __init__(self, config: Config, rehash: bool = False) -> None:
        set_environment()
        check_folders(config)
        check_writable(config)
        self.config, self.rehash = config, rehash
        self._stack = ExitStack()
        self._board: Board | None = None
        self._prepared: tuple[AnyPath, Manifest] | None = None

    def prepared(self) -> tuple[AnyPath, Manifest]:
        """The prepared data set, brought up to date on first use."""
        if self._prepared is None:
            self._prepared = prepare(self.config, self.board, self.rehash)
        return self._prepared

    def board(self) -> Board:
        if self._board is None:
            self._board = self._stack.enter_context(ray_session())
        return self._board

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def check_folders(config: Config) -> None:
    """Raise ConfigError for a folder that a later stage would miss, before an earlier one has worked for hours."""
    if config.evaluation.beir_dir:
        check_beir(Path(config.evaluation.beir_dir))
    if config.evaluation.sts_file:
        read_sts(Path(config.evaluation.sts_file))
    if config.embedding.model:
        check_model(as_path(config.embedding.model))


def check_model(place: AnyPath) -> None:
    """Raise ConfigError where there is no model to embed with, as far as that shows without its weights."""
    if not place.is_dir():
        raise ConfigError(
            f"embedding.model: found no folder {place}; allowed are a checkpoint's, and those of transformers and of "
            "sentence-transformers"
        )
    from pipeline.model.folder import FILES, is_ours, read_card  # torch, and for others' folders transformers

    folder = fetched(place)
    missing = [name for name in FILES if not (folder / name).is_file()] if is_ours(folder) else []
    if missing:
        raise ConfigError(f"embedding.model: found no {' and no '.join(missing)} in {place}; allowed is a whole model")
    try:
        read_card(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"embedding.model: {error}") from None


def prepare_stage(config: Config, session: Session) -> Result:
    """Token shards of the config's sources."""
    folder, manifest = session.prepared()
    metrics = {
        "rows_in": sum(source.rows_in for source in manifest.sources),
        "rows_kept": sum(source.rows_kept for source in manifest.sources),
        "tokens": sum(int(length["tokens"]) for length in manifest.lengths.values()),
        "splits": manifest.splits,
        "fingerprint": manifest.fingerprint,
    }
    return Result(metrics, {"prepared": str(folder), "manifest": str(folder / "manifest.json")})


def train_stage(config: Config, session: Session) -> Result:
    """A trained model; prepares first where the token shards are missing or stale."""
    folder, manifest = session.prepared()
    if config.objective.needs_pairs and not manifest.holds_pairs:
        raise ConfigError(
            f"objective: found prepared records of {', '.join(manifest.text_fields)} alone; allowed with contrastive "
            "and seq2seq are sources that give anchor and positive, and without pairs denoising, mlm and causal"
        )
    from pipeline.training.fit import finished_state, fit

    state = finished_state(config, folder, manifest)
    if state:
        log.info("train: nothing to do, the run is at its end, step %s", f"{state.step:,}")
    else:
        board = session.board()
        with alone_in(config.run_dir):
            state = fit(config, folder, manifest, board)
    model = model_folder(config)
    metrics = {"step": state.step, "train_seconds": round(state.train_seconds, 1), **state.metrics}
    paths = {"model": str(model), "history": str(config.run_dir / "metrics.jsonl")}
    return Result(metrics, paths)


def embed_stage(config: Config, session: Session) -> Result:
    """Every prepared record in the store, once."""
    folder, manifest = session.prepared()
    from pipeline.embedding.store import is_embedded, open_store

    model = _model_of(config, manifest)
    store = open_store(config, model)
    written = 0
    if is_embedded(config, manifest, store):
        log.info("embed: nothing to do, %s records are in %s", f"{store.count():,}", store.name)
    else:
        from pipeline.embedding.embed import embed

        written = embed(config, folder, manifest, model, store, session.board())
    return Result({"embedded": written, "rows": store.count()}, {"store": store.uri, "table": store.name})


def evaluate_stage(config: Config, session: Session, *, again: bool) -> Result:
    """Scores of the model and of BM25, on held-out pairs and a BEIR folder; `again` even where they are there."""
    folder, manifest = session.prepared()
    from pipeline.model.folder import model_fingerprint

    model, path = _model_of(config, manifest), config.run_dir / "evaluation.json"
    key = {
        "model": model_fingerprint(fetched(model)),
        "data": manifest.fingerprint,
        "evaluation": config.evaluation.model_dump(mode="json"),
        "files": [*_changes(config.evaluation.beir_dir), *_changes(config.evaluation.sts_file)],
    }
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    if earlier.get("of") == key and not again:
        log.info("evaluate: nothing to do, %s holds the scores", path)
        return Result(earlier["scores"], {"scores": str(path)})
    scores = _score_tasks(config, session, folder, manifest, model)
    write_atomically(path, json.dumps({"of": key, "scores": scores}, indent=2).encode())
    return Result(scores, {"scores": str(path)})


def _changes(path: str | None) -> list[list[str | int]]:
    """Name, size and time of change (ns) of a file, or of the files in a folder."""
    files = [] if path is None else [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("*.*"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _model_of(config: Config, manifest: Manifest) -> AnyPath:
    """The model to use with a data set: a run's own model goes with the data that it was trained on."""
    from pipeline.training.run_folder import refuse_other_run

    model = model_folder(config)
    if config.embedding.model is None:
        refuse_other_run(config, manifest.fingerprint, data_alone=True)
    return model


def _score_tasks(
    config: Config, session: Session, folder: AnyPath, manifest: Manifest, model: AnyPath
) -> dict[str, Any]:
    from pipeline.embedding.encode import TextEncoder
    from pipeline.evaluation.beir import RetrievalTask, read_beir
    from pipeline.evaluation.evaluate import encode_documents, held_out_task, score, score_sts

    tasks: list[Callable[[], RetrievalTask]] = []
    if config.evaluation.beir_dir:
        beir = read_beir(Path(config.evaluation.beir_dir)).normalised(normaliser(config.data))
        tasks.append(lambda: beir)
    if config.evaluation.held_out_queries and manifest.holds_pairs:
        tasks.append(lambda: held_out_task(config, folder, manifest))
    encoder = TextEncoder(model, config.embedding.batch_tokens, "cpu", config.embedding.dimensions)
    scores = {}
    for make in tasks:
        task = make()
        if not task.queries:
            log.warning("evaluate: %s is left out, it has no queries", task.name)
            continue
        ids, vectors = encode_documents(task, model, config, session.board())
        # A model need not give unit length; documents are ranked by cosine, in which a query's own length is no matter.
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        with Stage(f"evaluate: rank {task.name}, BM25 beside", len(task.queries), "queries") as stage:
            scores[task.name] = score(task, encoder, ids, vectors)
            stage.advance(len(task.queries))
    if config.evaluation.sts_file:
        pairs = read_sts(Path(config.evaluation.sts_file))
        with Stage(f"evaluate: {pairs.name}", len(pairs.scores), "pairs") as stage:
            scores[pairs.name] = score_sts(pairs, encoder, normaliser(config.data))
            stage.advance(len(pairs.scores))
    return scores


def score_table(scores: dict[str, Any]) -> str:
    """A line a model and task, and a line a file of sentence pairs."""
    from pipeline.evaluation.metrics import METRICS

    rows = [
        [f"{name} ({result['queries']:,} queries, {result['documents']:,} documents)", system]
        + [f"{result[system][metric]:.4f}" for metric in METRICS]
        for name, result in scores.items()
        if "queries" in result
        for system in ("model", "bm25")
    ]
    retrieval = [table(rows, ("task", "", *METRICS))] if rows else []
    similarity = [
        f"{name} ({result['pairs']:,} pairs): Spearman {result['model']['spearman']:.4f}"
        for name, result in scores.items()
        if "pairs" in result
    ]
    return "\n".join(retrieval + similarity)


def model_folder(config: Config) -> AnyPath:
    """The model to embed with: `embedding.model`, else the run's best. Raises JobError where there is none."""
    from pipeline.training.checkpoints import best_checkpoint

    if config.embedding.model:
        check_folders(config)
        return as_path(config.embedding.model)
    folder_or_none = best_checkpoint(config.run_dir)
    if folder_or_none is None:
        raise JobError(f"no trained model in {config.run_dir}; python jobs/train.py makes one")
    from pipeline.training.sharded import consolidate_where_it_lies

    consolidate_where_it_lies(folder_or_none)
    return folder_or_none
