"""Train an embedding model on your own text, embed the corpus and search it. The jobs call these functions; so can you.

    from pipeline import embed, load_config, search, train

    config = load_config("configs/pairs.yaml", ["training.max_steps=200"])
    train(config)                                   # prepares first; a run that was killed resumes
    embed(config)
    for hit in search(config, "remove duplicate rows", limit=3):
        print(hit.score, hit.source_id, hit.text)

Names are imported when you use them, so that `import pipeline` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import embed, evaluate, export, mine, prepare, report, run, train, tune
    from pipeline.config import Config, ConfigError
    from pipeline.config import load as load_config
    from pipeline.core.outcome import JobError, Result
    from pipeline.index.search import Hit, open_embedder, search

_HOMES = {
    **dict.fromkeys(
        ("prepare", "train", "tune", "evaluate", "embed", "mine", "export", "report", "run"), "pipeline.api"
    ),
    **dict.fromkeys(("Config", "ConfigError", "load_config"), "pipeline.config"),
    **dict.fromkeys(("JobError", "Result"), "pipeline.core.outcome"),
    **dict.fromkeys(("Hit", "open_embedder", "search"), "pipeline.index.search"),
}
__all__ = [
    "Config",
    "ConfigError",
    "Hit",
    "JobError",
    "Result",
    "embed",
    "evaluate",
    "export",
    "load_config",
    "mine",
    "open_embedder",
    "prepare",
    "report",
    "run",
    "search",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), "load" if name == "load_config" else name)
