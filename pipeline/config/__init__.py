"""The one config tree, from a YAML file, the environment and `section.key=value` arguments."""

from pipeline.config.data import Augment, Data, NearDuplicates, Quality, Safety, Sanitize, Source, Tokenizer
from pipeline.config.model import Model
from pipeline.config.objective import Objective, Writing
from pipeline.config.pinecone import Pinecone
from pipeline.config.reading import ConfigError
from pipeline.config.tree import Config, Embedding, load

__all__ = [
    "Augment",
    "Config",
    "ConfigError",
    "Data",
    "Embedding",
    "Model",
    "NearDuplicates",
    "Objective",
    "Pinecone",
    "Quality",
    "Safety",
    "Sanitize",
    "Source",
    "Tokenizer",
    "Writing",
    "load",
]
