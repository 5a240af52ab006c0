"""What the jobs do, as functions: each brings a stage and those before it up to date, and skips what is done.

    result = train(load_config("configs/pairs.yaml"))
    result.metrics["step"], result.paths["model"]

Common parameters: `check` only checks the config and the cluster and returns what it found; `rehash` reads every input
file again instead of trusting size and modification time. All functions raise ConfigError for a config that cannot work
and JobError for a run that failed. Ray is started if a stage has work to do and RAY_ADDRESS names no cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Literal

from pipeline.config import Config
from pipeline.core.outcome import JobError, Result
from pipeline.stages import (
    Session,
    check_stage,
    consolidated_model,
    embed_stage,
    evaluate_stage,
    merged_stage,
    mine_stage,
    prepare_stage,
    train_stage,
    tune_stage,
)


def prepare(config: Config, *, check: bool = False, rehash: bool = False) -> Result:
    """Read, clean, deduplicate and tokenize the sources into shards.

    prepare(config).metrics["rows_kept"]
    """
    return _run(config, ("prepare",), prepare_stage, check, rehash)


def train(config: Config, *, check: bool = False, rehash: bool = False) -> Result:
    """Train a model, or resume a run that was stopped.

    train(config).paths["model"]                   # a checkpoint folder: weights, tokenizer and optimizer
    """
    return _run(config, ("prepare", "train"), train_stage, check, rehash)


def tune(config: Config, *, check: bool = False, rehash: bool = False) -> Result:
    """Search for better values of the config's keys, or continue a sweep; writes best.yaml.

    train(load_config(tune(config).paths["best"]))
    """
    return _run(config, ("prepare", "tune"), tune_stage, check, rehash)


def embed(
    config: Config,
    *,
    dry_run: bool = False,
    verify: bool = False,
    rebuild: bool = False,
    check: bool = False,
    rehash: bool = False,
) -> Result:
    """Bring the vector table up to date with the data and let searches use it.

    embed(config).metrics["embedded"]              # only new and changed texts are embedded

    `dry_run` only counts what would be done, `verify` only compares the table with the data, and `rebuild` embeds all
    texts again.
    """

    def stage(session: Session) -> Result:
        return embed_stage(session, dry_run=dry_run, verify=verify, rebuild=rebuild)

    return _run(config, ("prepare", "encode", "store"), stage, check, rehash)


def evaluate(config: Config, *, again: bool = False, check: bool = False, rehash: bool = False) -> Result:
    """Score the model next to BM25 on the tasks of the config's `evaluation` section.

    evaluate(config).metrics["held-out"]["model"]["ndcg@10"]

    `again` computes scores that are already there.
    """
    return _run(config, ("prepare", "encode"), lambda session: evaluate_stage(session, again=again), check, rehash)


def mine(config: Config, *, check: bool = False, rehash: bool = False) -> Result:
    """Find hard negatives for the training pairs with the trained model, and write a data set that has them.

    mine(config).paths["prepared"]                 # train on it with data.prepared and another storage.run
    """
    return _run(config, ("prepare", "encode"), mine_stage, check, rehash)


def run(config: Config, *, check: bool = False, rehash: bool = False) -> Result:
    """Prepare, train, evaluate, embed and publish. `metrics` has those of each stage under its name.

    run(config).metrics["train"]["step"]

    Writes the run's report at the end. Raises JobError before it embeds, if the model does not beat what
    `evaluation.must_beat` names.
    """

    def stages(session: Session) -> Result:
        from pipeline.evaluation.job import refuse_unbeaten

        results = {
            "prepare": prepare_stage(session),
            "train": train_stage(session),
            "evaluate": evaluate_stage(session, again=False),
        }
        refuse_unbeaten(config)
        results["embed"] = embed_stage(session)
        paths = {name: path for result in results.values() for name, path in result.paths.items()}
        return Result({name: result.metrics for name, result in results.items()}, paths)

    needs = ("prepare", "train", "encode", "store")
    if check:
        return _run(config, needs, stages, check, rehash)
    from pipeline.report.job import try_report

    try:
        result = _run(config, needs, stages, check, rehash)
    except JobError:
        try_report(config)
        raise
    return replace(result, paths=result.paths | try_report(config))


def report(config: Config, runs: Sequence[str] = ()) -> Result:
    """Write the run's report as one HTML page, or a page that compares several `runs` of the same storage.root.

    report(config).paths["report"]
    """
    from pipeline.report.job import compare, write_report

    return compare(config, runs) if runs else write_report(config)


def export(
    config: Config,
    to: str,
    *,
    license_id: str | None = None,
    onnx: bool = False,
    embeddings: Literal["float32", "float16"] | None = None,
    merge_share: float | Literal["auto"] | None = None,
    evaluate_command: str = "tep evaluate",
) -> Result:
    """Write the run's best model as a folder that sentence-transformers and transformers load.

    export(config, "exported")                     # SentenceTransformer("exported")

    `license_id` and `evaluate_command` are for the model card. `onnx` adds model.onnx, `embeddings` the run's vectors
    as a matrix of that type. `merge_share` merges the model with the pretrained one it began from, against forgetting
    what that knew: this share of the model, or the best on the validation split ("auto").
    """
    from pipeline.evaluation.export import destination, write_export

    model, share = consolidated_model(config), None
    if merge_share is not None:
        model, share = merged_stage(config, model, merge_share)
    result = write_export(
        config,
        model,
        destination(to),
        license_id=license_id,
        onnx=onnx,
        embeddings=embeddings,
        evaluate_command=evaluate_command,
    )
    return result if share is None else replace(result, metrics={"merge_share": share, **result.metrics})


def _run(
    config: Config, needs: Collection[str], stage: Callable[[Session], Result], check: bool, rehash: bool
) -> Result:
    with Session(config, rehash, needs) as session:
        return check_stage(session) if check else stage(session)
