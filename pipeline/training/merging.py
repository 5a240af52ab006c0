"""Merges a trained model with the pretrained one it began from: `share × tuned + (1 − share) × base`, weight by weight.

    folder, share = merged_model(config, checkpoint, 0.7)     # <run>/merged/<key>, a model folder
    folder, share = merged_model(config, checkpoint, "auto")  # the share that ranks the validation split best

Training on one domain forgets some of what the base knew of others; between the two models is often one that keeps both
(WiSE-FT, Wortsman et al. 2022, section 3; for embeddings LM-Cocktail, Xiao et al. 2023). Cost: three models in memory;
"auto" encodes the validation records eleven times.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import Config, ConfigError
from pipeline.core.artifact import Artifact
from pipeline.core.console import log
from pipeline.core.files import local_copy
from pipeline.core.path import StoragePath
from pipeline.core.tokenizer_files import parse_tokenizer
from pipeline.data.drift import TrainedOn
from pipeline.data.manifest import read_prepared
from pipeline.model.folder import FILES, is_ours, model_fingerprint
from pipeline.model.learner import Learner
from pipeline.training.assembly import RunSpec, build_learner, build_validation
from pipeline.training.stopping import BestModel
from pipeline.training.validation import validate

SHARES = [tenths / 10 for tenths in range(11)]  # that "auto" tries
OPTION = "--merge-share"
WEIGHTS, *OTHER_FILES = FILES

Share = float | Literal["auto"]
Weights = Mapping[str, Tensor]


def merged_weights(tuned: Weights, base: Weights, share: float) -> dict[str, Tensor]:
    """`share × tuned + (1 − share) × base`: exactly `tuned` for 1 and `base` for 0. Integers are those of `tuned`.

    Raises ValueError if the two have other names or shapes.
    """
    shapes = [{name: tensor.shape for name, tensor in weights.items()} for weights in (tuned, base)]
    if differing := dict(set(shapes[0].items()) ^ set(shapes[1].items())):
        raise ValueError(f"{len(differing)} weights are of one of the two alone, or of another shape: {min(differing)}")
    return {
        name: torch.lerp(base[name], weight, share) if weight.is_floating_point() else weight
        for name, weight in tuned.items()
    }


def merged_model(config: Config, model: StoragePath, share: Share) -> tuple[StoragePath, float]:
    """The folder of the merged model, and the share of `model` in it; "auto" chooses it.

    Raises ConfigError if the run did not begin from a pretrained model, or "auto" has nothing to choose by.
    """
    if not config.model.pretrained:
        raise ConfigError(f"{OPTION}: found a run from scratch; allowed are runs that began from model.pretrained")
    local = local_copy(model)
    if not is_ours(local):
        raise ConfigError(f"{OPTION}: found {model}, which is no checkpoint; leave embedding.model out")
    learner = _untrained(config, local)
    base = {name: weight.clone() for name, weight in learner.model.weights().items()}
    tuned = load_file(local / WEIGHTS)
    try:
        merged_weights(tuned, base, 1.0)
    except ValueError as error:
        raise ConfigError(
            f"{OPTION}: found a model that did not begin from model.pretrained={config.model.pretrained}, because "
            f"{error}; give the model that the run began from"
        ) from None
    chosen = _best_share(config, learner, tuned, base) if share == "auto" else share
    key = {"tuned": model_fingerprint(local), "base": _hash_of(base), "share": chosen}
    artifact = Artifact(config.run_dir / "merged", "", key)

    def fill() -> dict[str, Any]:
        with artifact.output.writing(WEIGHTS) as file:
            save_file(merged_weights(tuned, base, chosen), file)
        for name in OTHER_FILES:
            artifact.output.write(name, (local / name).read_bytes())
        return key

    artifact.make(fill)
    return artifact.folder, chosen


def _hash_of(weights: Weights) -> str:
    digest = xxhash.xxh3_128()
    for name, weight in weights.items():
        digest.update(name.encode())
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def _untrained(config: Config, model: Path) -> Learner:
    """The learner as it was before training, with the contrastive objective alone if there is one.

    It has no adapters, because a checkpoint's weights have them merged.
    """
    config = config.changed({"model.lora": None}, OPTION)
    if config.objective.contrastive:
        contrastive = config.objective.contrastive.model_dump(mode="json")
        config = config.changed({"objective": {"contrastive": contrastive}}, OPTION)
    path = model / "tokenizer.json"
    tokenizer = parse_tokenizer(path.read_text(encoding="utf-8"), path)
    return build_learner(config, tokenizer, negatives=False).eval()


def _best_share(config: Config, learner: Learner, tuned: Weights, base: Weights) -> float:
    """The share whose model scores best on the validation split, by `training.best_metric`; of equal ones the largest.

    Changes the learner's weights.
    """
    started = TrainedOn.read(config)
    folder = config.root / started.prepared if started else None
    manifest = read_prepared(folder) if folder else None
    if not learner.objective.contrastive or folder is None or manifest is None:
        lacking = "the prepared data of the run" if learner.objective.contrastive else "a contrastive objective"
        raise ConfigError(f"{OPTION}: found auto without {lacking} to choose by; give a share, as in {OPTION} 0.7")
    spec = RunSpec.of(config, folder, manifest)
    tokenizer_file = folder / "tokenizer.json"
    validation = build_validation(spec, parse_tokenizer(spec.tokenizer_json, tokenizer_file), learner.views)
    best = BestModel(config.training, learner.weights)
    scores: dict[float, float] = {}
    for share in SHARES:
        learner.model.load_weights(merged_weights(tuned, base, share))
        scores[share] = best.score(validate(learner, validation, torch.device("cpu")))
        log.info("export: with %.1f of the trained model, %s is %.4f", share, best.metric, abs(scores[share]))
    return max(scores, key=lambda share: (scores[share], share))
