"""The stages of a job. Each brings one thing up to date, or finds that it is up to date.

A stage takes a `Session`, which starts Ray when a stage first has work to do. A rerun of finished work needs no Ray.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Collection
from contextlib import ExitStack
from types import TracebackType
from typing import Literal

from pipeline.config import Config, ConfigError
from pipeline.core.cluster import accelerators, connected_cluster, restrict_data_to
from pipeline.core.console import log, log_lines, log_timeline
from pipeline.core.files import write_atomically
from pipeline.core.job_record import JobRecord, machine
from pipeline.core.object_store import BucketError
from pipeline.core.outcome import JobError, Result, command, findings_table, job_lock, raise_findings
from pipeline.core.path import StoragePath, as_path
from pipeline.core.session import Progress, ray_session, set_environment
from pipeline.data.drift import has_moved, log_drift
from pipeline.data.feed import training_plan, warn_of_equal_positives
from pipeline.data.manifest import Manifest
from pipeline.data.prepare import Inputs, prepare
from pipeline.evaluation.tasks import check_tasks
from pipeline.preflight import preflight


class Session:
    """A job's config and its Ray session, which is started and checked on first use.

    `needs` names the work ahead, for the check of the cluster: prepare, train, tune, encode, store.
    """

    def __init__(self, config: Config, rehash: bool = False, needs: Collection[str] = ("prepare",)) -> None:
        set_environment()
        check_folders(config)
        self.config, self.rehash, self.needs = config, rehash, needs
        self.record = JobRecord()
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._prepared: tuple[StoragePath, Manifest] | None = None

    def prepared(self) -> tuple[StoragePath, Manifest]:
        """The prepared data set, brought up to date on first use. Logs how far it is from the run's training data."""
        if self._prepared is None:
            with self.record.stage("prepare"):
                self._prepared = prepare(self.config, self.progress, self.rehash)
            log_drift(self.config, *self._prepared)
        return self._prepared

    def progress(self) -> Progress:
        """Start Ray on first use. Raises ConfigError or JobError if the cluster lacks what the job needs."""
        if self._progress is None:
            check_writable(self.config)
            self._progress = self._stack.enter_context(ray_session())
            restrict_data_to(self.config.scaling.labels.data)
            findings = preflight(self.config, self.needs)
            log_lines(findings_table(findings), logging.DEBUG)
            raise_findings(findings)
            self.record.hardware = machine() | {"cluster": str(connected_cluster()), "accelerators": accelerators()}
            log_timeline("preflight is done")
        return self._progress

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        status = "ok" if kind is None else "stopped" if issubclass(kind, KeyboardInterrupt | SystemExit) else "failed"
        try:
            self.record.write(self.config.run_dir, status)
        except (OSError, BucketError) as lost:
            log.debug("the job's record could not be written: %s", lost)


def check_writable(config: Config) -> None:
    """Raise ConfigError if nothing can be written to storage.root."""
    probe = config.root / f".probe-{uuid.uuid4().hex}"
    try:
        write_atomically(probe, b"")
        probe.unlink()
    except BucketError as error:
        raise ConfigError(f"storage.root: {error}; they must allow writing and deleting") from None
    except OSError as error:
        raise ConfigError(
            f"storage.root: found {config.root}, where nothing can be written ({error.strerror}); allowed is a folder "
            "that this user may write to, as in storage.root=DIR"
        ) from None


def check_stage(session: Session) -> Result:
    """Check the config and the cluster without doing any work. Raises ConfigError or JobError as the job would."""
    with ray_session():
        findings = preflight(session.config, session.needs)
        if "prepare" in session.needs and session.config.data.prepared is None:
            findings.append(Inputs(session.config, session.rehash).room)
    log_lines(findings_table(findings))
    raise_findings(findings)
    found = {each.what: each.found for each in findings}
    return Result(found, summary="Nothing is missing. Run the same command without --check.")


def check_folders(config: Config) -> None:
    """Raise ConfigError now for a missing folder that a later stage needs, not after hours of work."""
    check_tasks(config.evaluation)
    base = config.model.pretrained or config.model.static_from or config.objective.teacher
    if "base" in config.evaluation.must_beat and not base:
        raise ConfigError(
            "evaluation.must_beat: found base, but the run begins from no model; set model.pretrained or "
            "model.static_from, or leave base out"
        )
    if "bm25" in config.evaluation.must_beat and not config.evaluation.bm25:
        raise ConfigError("evaluation.must_beat: found bm25, but evaluation.bm25 is false; set it to true")
    if config.objective.teacher or config.model.static_from:
        from pipeline.index.teacher import check_teacher

        check_teacher(config)
    if config.embedding.model:
        from pipeline.index.published import check_model

        check_model(as_path(config.embedding.model))


def prepare_stage(session: Session) -> Result:
    """Prepare the token shards of the config's sources."""
    folder, manifest = session.prepared()
    metrics = {
        "rows_in": sum(source.rows_in for source in manifest.sources),
        "rows_kept": sum(source.rows_kept for source in manifest.sources),
        "tokens": sum(int(length["tokens"]) for length in manifest.lengths.values()),
        "splits": manifest.splits,
        "fingerprint": manifest.fingerprint,
    }
    return Result(metrics, {"prepared": str(folder), "manifest": str(folder / "manifest.json")})


def _check_pairs(config: Config, manifest: Manifest) -> None:
    if config.objective.needs_pairs and not manifest.holds_pairs:
        raise ConfigError(
            f"objective: found prepared records with only {', '.join(manifest.text_fields)}; contrastive and seq2seq "
            "need sources with anchor and positive; allowed without them are objective.contrastive.views=crops, "
            "denoising, mlm and causal"
        )


def _with_teacher(session: Session, folder: StoragePath, manifest: Manifest) -> Manifest:
    """The manifest with what a teacher makes for training: vectors of the texts, or a token table to start from."""
    from pipeline.index.static_table import with_initial_table
    from pipeline.index.teacher import with_teacher

    manifest = with_teacher(session.config, folder, manifest, session.progress)
    return with_initial_table(session.config, folder, manifest, session.progress)


def _choose_layers(session: Session) -> Config:
    """Replace model.num_layers=auto by the run's number, or a new run's, in the session's config, and return that."""
    config, (folder, manifest) = session.config, session.prepared()
    if config.model.num_layers != "auto" or config.model.pretrained:
        return config
    from pipeline.training.run_folder import begun_with
    from pipeline.training.stopping import steps_of
    from pipeline.training.workers import AUTO_TABLE_WARMUP, choose_layers, size_workers

    keys = ("model.num_layers", "training.table_warmup_fraction")
    chosen = begun_with(config, keys)
    why = "as the run began"
    if not chosen:
        session.progress()
        training, rows = config.training, max(1, sum(manifest.splits.values()))
        plan = training_plan(folder, manifest, training.global_batch_size, training.seed, training.batching)
        tokens = sum(lengths["tokens"] for lengths in manifest.lengths.values()) / rows
        workers = size_workers(config, connected_cluster(), batch_size=plan.global_batch_size)
        layers, why = choose_layers(config, workers, tokens * plan.global_batch_size * steps_of(config, plan))
        chosen = {keys[0]: layers}
        if layers and "table_warmup_fraction" not in training.model_fields_set:
            chosen[keys[1]] = AUTO_TABLE_WARMUP
    log.info("train: %s: %s", ", ".join(f"{key}={value}" for key, value in chosen.items()), why)
    session.config = config.changed(chosen, "model.num_layers=auto")
    return session.config


def train_stage(session: Session) -> Result:
    """Train a model, or resume training; prepares first if token shards are missing or stale."""
    config, (folder, manifest) = _choose_layers(session), session.prepared()
    _check_pairs(config, manifest)
    from pipeline.training.checkpoints import resume_point
    from pipeline.training.fit import fit, is_done

    point = resume_point(config.run_dir)
    state = point.state
    if is_done(config, folder, manifest, state):
        log.info("train: nothing to do, the run is at its end, step %s", f"{state.step:,}")
    else:
        warn_of_equal_positives(config, folder, manifest)
        manifest = _with_teacher(session, folder, manifest)
        progress = session.progress()
        with session.record.stage("train"), job_lock(config.run_dir):
            state = fit(config, folder, manifest, progress, known=point)
    model = consolidated_model(config)
    metrics = {"step": state.step, "train_seconds": round(state.train_seconds, 1), **state.metrics}
    paths = {"model": str(model), "history": str(config.run_dir / "metrics.jsonl")}
    return Result(metrics, paths)


def tune_stage(session: Session) -> Result:
    """Run a sweep, or the rest of one: trials on one prepared data set, and the config of the best."""
    config, (folder, manifest) = _choose_layers(session), session.prepared()
    _check_pairs(config, manifest)
    from pipeline.training.sweep import sweep

    warn_of_equal_positives(config, folder, manifest)
    manifest = _with_teacher(session, folder, manifest)
    with job_lock(config.run_dir / "tune"):
        return sweep(config, folder, manifest, session.progress)


def embed_stage(session: Session, *, dry_run: bool = False, verify: bool = False, rebuild: bool = False) -> Result:
    """Bring the vector table up to date with the documents, then publish it to readers.

    `dry_run` only counts the work, `verify` only compares the table with the data, `rebuild` embeds all texts again.
    """
    model_folder(session.config)  # a missing model is reported now, not after preparing data
    config, (folder, manifest) = session.config, session.prepared()
    from pipeline.index.job import Index

    index = Index.of(config, folder, manifest, _model_of(config, manifest))
    table = index.table
    if dry_run:
        metrics = index.estimate(session.progress)
    elif verify:
        metrics = index.verify(session.progress)
    elif config.embedding.store == "lancedb" and index.is_done() and not rebuild:
        log.info("embed: nothing to do, %s documents are in %s", f"{table.count():,}", table.path)
        index.publish()
        metrics = {"embedded": 0, "rows": table.count()}
    else:
        with session.record.stage("embed"):
            metrics = index.bring_up_to_date(session.progress, rebuild=rebuild)
    return Result(metrics, {"store": str(table.home), "table": table.name})


def evaluate_stage(session: Session, *, again: bool) -> Result:
    """Score the model, compare it with BM25, its base and the published model; `again` recomputes its scores."""
    model_folder(session.config)
    config, (folder, manifest) = session.config, session.prepared()
    from pipeline.evaluation.job import Evaluation

    evaluation = Evaluation(config, folder, manifest, session.progress)
    with session.record.stage("evaluate"):
        return evaluation.run(_model_of(config, manifest), again=again)


def mine_stage(session: Session) -> Result:
    """Write a copy of the run's data set that has hard negatives."""
    model_folder(session.config)
    config, (folder, manifest) = session.config, session.prepared()
    from pipeline.index.mine import mine
    from pipeline.index.published import encoder_recipe
    from pipeline.index.teacher import model_recipe

    recipe = encoder_recipe(config, _model_of(config, manifest))
    guide = model_recipe(config, "mining.guide", config.mining.guide) if config.mining.guide else None
    target, mined = mine(config, folder, manifest, recipe, session.progress, guide)
    name = f"{target.parent.name}/{target.name}"
    log.info("mine: to train on the mined negatives, set data.prepared=%s and another storage.run", name)
    metrics = {
        "splits": mined.splits,
        "fingerprint": mined.fingerprint,
        "negatives": mined.lengths["negatives"]["rows"],
    }
    return Result(metrics, {"prepared": str(target), "manifest": str(target / "manifest.json")})


def _model_of(config: Config, manifest: Manifest) -> StoragePath:
    """The model to use with a data set. Raises ConfigError if the run's own model does not fit the data any more."""
    model = consolidated_model(config)
    if config.embedding.model is None and has_moved(config, manifest):
        from pipeline.training.checkpoints import resume_point
        from pipeline.training.run_folder import refuse_unfinished

        refuse_unfinished(config, manifest, resume_point(config.run_dir).state, model)
    return model


def consolidated_model(config: Config) -> StoragePath:
    """`model_folder`, after writing the weights into one file if fsdp workers left them in parts."""
    from pipeline.training.checkpoints import is_sharded

    model = model_folder(config)
    if is_sharded(model):
        from pipeline.training.saving import consolidate  # and torch

        consolidate(model)
    return model


def merged_stage(config: Config, model: StoragePath, share: float | Literal["auto"]) -> tuple[StoragePath, float]:
    """A model folder between a model and the pretrained one it began from, and the model's share in it."""
    from pipeline.training.merging import merged_model  # and torch

    return merged_model(config, model, share)


def model_folder(config: Config) -> StoragePath:
    """The model to embed with: `embedding.model`, else the run's best. Raises JobError if there is none."""
    from pipeline.index.published import check_model
    from pipeline.training.checkpoints import best_checkpoint

    if config.embedding.model:
        check_model(as_path(config.embedding.model))
        return as_path(config.embedding.model)
    best = best_checkpoint(config.run_dir)
    if best is None:
        raise JobError(f"no trained model in {config.run_dir}; run {command('train')} first")
    return best
