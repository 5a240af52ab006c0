"""The config, read from a YAML file, the environment and `section.key=value` arguments."""

from pipeline.config.data import Augment, Data, NearDuplicates, Quality, Safety, Sanitize, Source, Tokenizer
from pipeline.config.embedding import Embedding, Pinecone
from pipeline.config.evaluation import Mining
from pipeline.config.loading import load
from pipeline.config.model import Model
from pipeline.config.objective import Objective, Writing
from pipeline.config.tree import Config
from pipeline.config.tune import Dimension, Tune
from pipeline.core.outcome import ConfigError

__all__ = [
    "Augment",
    "Config",
    "ConfigError",
    "Data",
    "Dimension",
    "Embedding",
    "Mining",
    "Model",
    "NearDuplicates",
    "Objective",
    "Pinecone",
    "Quality",
    "Safety",
    "Sanitize",
    "Source",
    "Tokenizer",
    "Tune",
    "Writing",
    "load",
]
