"""Scores a run's model, and compares it with BM25, with its base and with the model that is published.

    Evaluation(config, folder, manifest, session.progress).run(model, again=False)
    refuse_unbeaten(config)                     # JobError if it does not beat what evaluation.must_beat names

Each model's scores are an artifact in <run>/evaluations/, so a model is scored once on the same data and tasks.
<run>/evaluation.json has the scores of the run's model and the comparisons.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pipeline.config import Config
from pipeline.config.evaluation import Evaluation as Settings
from pipeline.core.artifact import Artifact
from pipeline.core.console import log
from pipeline.core.files import files_below, local_copy, may_write, write_atomically
from pipeline.core.outcome import JobError, Result, command
from pipeline.core.path import StoragePath, as_path
from pipeline.core.session import Progress
from pipeline.data.manifest import Manifest
from pipeline.evaluation.examples import Details
from pipeline.evaluation.tasks import GENERAL
from pipeline.evaluation.verdict import NAMES, ByQuery, comparisons
from pipeline.index.encoder import EncoderRecipe
from pipeline.index.published import encoder_recipe, published
from pipeline.index.teacher import holds_vectors, model_recipe
from pipeline.model.folder import model_fingerprint

FORMAT = 4  # raise it when scores change: earlier ones are computed again


@dataclass(frozen=True)
class Evaluation:
    """The tasks of a config on a prepared data set."""

    config: Config
    folder: StoragePath
    manifest: Manifest
    progress: Callable[[], Progress]

    def run(self, model: StoragePath, *, again: bool) -> Result:
        """Score and compare a model; `again` recomputes its scores."""
        config, latest = self.config, self.config.run_dir / "evaluation.json"
        scored = self._scored(encoder_recipe(config, model), config.evaluation, again=again)
        compared = config.evaluation.model_copy(update={"bm25": False, "mteb": []})
        others = {
            name: _by_query(self._scored(recipe, compared, again=False)) for name, recipe in self._others(model).items()
        }
        content = json.loads((scored.folder / "scores.json").read_text(encoding="utf-8"))
        found = comparisons(_by_query(scored), others)
        for each in found:
            log.info("evaluate: %s", each.sentence)
        own, must_beat = [each for each in found if not each.task.startswith(GENERAL)], config.evaluation.must_beat
        content["artifact"] = f"evaluations/{scored.folder.name}"
        content["comparisons"] = [{**vars(each), "verdict": each.verdict, "sentence": each.sentence} for each in found]
        content["not_beaten"] = [each.sentence for each in own if each.other in must_beat and each.verdict != "better"]
        content["not_beaten"] += [
            f"It was not compared with {NAMES[other]} on any retrieval task of your own."
            for other in must_beat
            if other not in {each.other for each in own}
        ]
        text = json.dumps(content, indent=2).encode()
        if not latest.is_file() or latest.read_bytes() != text:
            write_atomically(latest, text)
        return Result(content["scores"], {"scores": str(latest)})

    def _scored(self, recipe: EncoderRecipe, wanted: Settings, *, again: bool) -> Artifact:
        """A model's scores: scores.json, queries.json with the NDCG@10 of each query, and examples.json."""
        files = (wanted.beir_dir, wanted.sts_file, wanted.general, wanted.clustering_file, wanted.classification_dir)
        key = {
            "format": FORMAT,
            "model": model_fingerprint(recipe.local),
            "data": self.manifest.fingerprint,
            "evaluation": wanted.model_dump(mode="json", exclude={"must_beat"}),
            "space": recipe.fingerprint,
            "files": [change for path in files for change in _changes(path)],
            "mteb": version("mteb") if wanted.mteb else None,
        }
        scored = artifact_of(self.config.run_dir, key)

        def fill() -> dict[str, Any]:
            from pipeline.evaluation.scoring import score_tasks

            details = Details()
            config = _as_held_out(self.config, self.manifest).model_copy(update={"evaluation": wanted})
            scores = score_tasks(config, self.folder, self.manifest, recipe, self.progress, details)
            scored.output.write("scores.json", json.dumps({"of": key, "scores": scores}, indent=2).encode())
            scored.output.write("queries.json", json.dumps(details.by_query).encode())
            scored.output.write("examples.json", json.dumps(details.examples, indent=1).encode())
            return {"scores": scores}

        again = again and may_write(scored.folder)
        if not again and scored.read():
            log.info("evaluate: nothing to do, %s holds the scores", scored.folder)
        scored.make(fill, again=again)
        return scored

    def _others(self, model: StoragePath) -> dict[str, EncoderRecipe]:
        """The base that the run began from, and the model that is published, if it is another."""
        config, found = self.config, dict[str, EncoderRecipe]()
        for key, name in {
            "model.pretrained": config.model.pretrained,
            "model.static_from": config.model.static_from,
            config.objective.teacher_key: config.objective.teacher,
        }.items():
            if name and not holds_vectors(name):
                found["base"] = model_recipe(config, key, name)
                break
        with suppress(JobError):
            recipe, _ = published(config)
            own = model_fingerprint(local_copy(model))
            if config.embedding.model is None and model_fingerprint(recipe.local) != own:
                found["previous"] = recipe
        return found


def artifact_of(run_dir: StoragePath, key: dict[str, Any]) -> Artifact:
    """The artifact of the scores that evaluation.json says are `of` these inputs."""
    return Artifact(run_dir / "evaluations", "", key)


def refuse_unbeaten(config: Config) -> None:
    """Raise JobError if the last evaluation's model does not beat what `evaluation.must_beat` names."""
    content = json.loads((config.run_dir / "evaluation.json").read_text(encoding="utf-8"))
    if content["not_beaten"]:
        raise JobError(
            f"the model was not published, because of evaluation.must_beat: {' '.join(content['not_beaten'])} To "
            f"publish it all the same: {command('run')} 'evaluation.must_beat=[]'"
        )


def _by_query(scored: Artifact) -> ByQuery:
    return json.loads((scored.folder / "queries.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _as_held_out(config: Config, manifest: Manifest) -> Config:
    """The config with the share of records that prepare held out, which is larger on small data."""
    if manifest.held_out_fraction is None:
        return config
    data = config.data.model_copy(update={"validation_fraction": manifest.held_out_fraction})
    return config.model_copy(update={"data": data})


def _changes(path: str | None) -> list[list[str | int]]:
    """Name, size and modification time (ns) of a file, or of each file in a folder."""
    if path is None:
        return []
    place = as_path(path)
    files = {place.name: place.stat()} if place.is_file() else files_below(place)
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files.items()]
