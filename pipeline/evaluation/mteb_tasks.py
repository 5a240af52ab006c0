"""Scores a model on tasks of MTEB, with the library `mteb`, which downloads their data from the Hugging Face hub.

    find_tasks(["STSBenchmark"])                    # ConfigError if mteb is not installed or has no such task
    score_mteb(["STSBenchmark"], TextVectors(recipe, progress), normalise)
    # {"MTEB STSBenchmark": {"texts": 2758, "model": {"cosine_spearman": 0.8131}}}

The score is the task's main one, as mteb computes it, averaged over its splits and subsets. Queries and documents get
the model's prompts; the texts of symmetric tasks, such as STS, get none. Texts are normalised like the training
records. Cost: that of the task; a multilingual one has a subset for each language.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from pipeline.config import ConfigError
from pipeline.core.console import Stage
from pipeline.core.object_store import cause
from pipeline.core.outcome import JobError
from pipeline.data.hub import hub_errors
from pipeline.evaluation.retrieval import TextVectors
from pipeline.index.vectors import Floats, unit

KEY = "evaluation.mteb"


def find_tasks(names: Iterable[str]) -> list[Any]:
    """The tasks of these names. Raises ConfigError without `mteb`, for an unknown name, and for images or audio."""
    if find_spec("mteb") is None:
        raise ConfigError(
            f"{KEY}: MTEB tasks need the library mteb; run pip install 'text-embedding-pipeline[mteb]', or leave the "
            "tasks out"
        )
    import mteb

    found = []
    for name in names:
        try:
            found.append(mteb.get_task(name))
        except KeyError:
            known = {
                task.metadata.name.lower(): task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)
            }
            near = [known[each] for each in difflib.get_close_matches(name.lower(), known, 3, 0.5)]
            meant = f"did you mean {' or '.join(near)}?" if near else "mteb.get_tasks() lists its tasks"
            raise ConfigError(f"{KEY}: mteb has no task {name!r}; {meant}") from None
        if found[-1].metadata.modalities != ["text"]:
            kinds = " and ".join(found[-1].metadata.modalities)
            raise ConfigError(f"{KEY}: {name} is a task of {kinds}; allowed are tasks of text alone")
    return found


def score_mteb(
    names: Sequence[str], vectors: TextVectors, normalise: Callable[[str], str]
) -> dict[str, dict[str, Any]]:
    """The main score of each task. Raises JobError if the hub does not give a task's data."""
    import mteb

    scores = {}
    for name, task in zip(names, find_tasks(names), strict=True):
        try:
            for each in getattr(task, "tasks", [task]):  # an aggregate has several
                each.load_data()
        except hub_errors() as error:
            raise JobError(
                f"{KEY}: cannot load the data of {name}: {cause(error)}; it comes from the Hugging Face hub: check the "
                "network and, if it is gated, HF_TOKEN, or leave the task out"
            ) from None
        encoder = Encoder(vectors, normalise)
        with Stage(f"evaluate: MTEB {name}", None, "texts") as stage:
            (result,) = mteb.evaluate(
                encoder, task, cache=None, co2_tracker=False, show_progress_bar=False
            ).task_results
            stage.advance(encoder.texts)
        for each in getattr(task, "tasks", [task]):
            each.unload_data()
        main = {task.metadata.main_score: round(float(result.get_score()), 4)}
        scores[f"MTEB {name}"] = {"texts": encoder.texts, "model": main}
    return scores


class Encoder:
    """Our encoder behind mteb's `EncoderProtocol`. `texts` counts what it encoded."""

    def __init__(self, vectors: TextVectors, normalise: Callable[[str], str]) -> None:
        self.vectors, self.normalise, self.texts = vectors, normalise, 0

    def encode(
        self, inputs: Iterable[dict[str, Any]], *, task_metadata: Any, prompt_type: str | None = None, **kwargs: Any
    ) -> Floats:
        """(N, D) vectors of the texts of all batches; `prompt_type` is query, document or None."""
        texts = [self.normalise(text) for batch in inputs for text in batch["text"]]
        self.texts += len(texts)
        return self.vectors.of(texts, task_metadata.name, str(prompt_type or ""))

    def similarity(self, first: Any, second: Any) -> Floats:
        """Cosines of (N, D) and (M, D) vectors, (N, M)."""
        return unit(np.atleast_2d(first)) @ unit(np.atleast_2d(second)).T

    def similarity_pairwise(self, first: Any, second: Any) -> Floats:
        """Cosines of (N, D) and (N, D) vectors, (N,)."""
        cosines: Floats = (unit(np.atleast_2d(first)) * unit(np.atleast_2d(second))).sum(axis=1)
        return cosines

    @property
    def mteb_model_meta(self) -> Any:
        from mteb.models.model_meta import ModelMeta

        return ModelMeta.create_empty()
