"""Saves and loads models: `model.safetensors`, `model.json` (architecture and head) and `tokenizer.json`. No pickle.

    save_model(folder, model, tokenizer_json, max_length=256)
    model, tokenizer = load_model(folder)
    read_card(folder).head.prompt("query")          # does not read the weights
    model_fingerprint(folder)                       # '9f0c…': identifies the vectors that this model gives

A folder without model.json is read as a transformers or sentence-transformers model (model/hf_io.py). Cost: importing
this module does not import torch; saving or loading weights does, and so does reading a folder without model.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
import xxhash
from pydantic import ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from pipeline.core.tokenizer_files import parse_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.model.embedding_model import EmbeddingModel

FILES = ("model.safetensors", "model.json", "tokenizer.json")

CAUSAL_FAMILIES = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")
FAMILIES = (  # of transformers, by model_type, whose layers run on packed tokens; others run padded
    "bert",
    "camembert",
    "distilbert",
    "electra",
    "eurobert",
    "gte",
    "modernbert",
    "nomic_bert",
    "roberta",
    "xlm-roberta",
    *CAUSAL_FAMILIES,
)

Shapes = Mapping[str, Sequence[int]]
"""The shapes of weights by name."""

SIZE_LIMIT = 1 << 31
Size = Annotated[int, Field(ge=1, lt=SIZE_LIMIT)]
_EXACT = ConfigDict(extra="forbid", strict=True)  # for files that are read

Activation = Literal["Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid"]  # of torch.nn
ACTIVATIONS = get_args(Activation)
Pooling = Literal["mean", "cls", "last", "weighted", "max", "mean_sqrt_len"]


@dataclass(frozen=True)
class Projection:
    """A linear layer and an activation after pooling: a Dense module of sentence-transformers."""

    __pydantic_config__ = _EXACT

    width: Size
    """Size of its output."""
    bias: bool = True
    activation: Activation = "Tanh"
    residual: bool = False
    """Adds the input to the output, through another linear layer if their sizes differ."""
    unit_input: bool = False
    """Scales the input to unit length first."""


@dataclass(frozen=True)
class Head:
    """How token states become a vector: pooling, then projections, then normalisation.

    mean: the mean of all states. cls: the first token's state. last: the last token's state. weighted: a mean in which
    the i-th token, counted from 1, has weight i (SGPT, section 3.1.2). max: the largest state in each dimension.
    mean_sqrt_len: the sum of all states over the square root of their number.
    """

    __pydantic_config__ = _EXACT

    pooling: Pooling = "mean"
    normalize: bool = True
    dimensions: tuple[int, ...] = ()
    """Sizes below D that vectors can be truncated to (Matryoshka), largest first."""
    prompts: tuple[tuple[str, str], ...] = ()
    """(name, prompt) pairs; name is `query` or `document`. The prompt is prepended to such texts."""
    projections: tuple[Projection, ...] = ()
    """Applied to the pooled vector, in this order."""

    def prompt(self, name: str) -> str:
        return dict(self.prompts).get(name, "")


@dataclass(frozen=True)
class ModelSpec:
    """The content of `model.json`: the backbone's architecture and shape, and the head."""

    __pydantic_config__ = _EXACT

    architecture: Literal["unified", "pretrained"]
    shape: dict[str, Any]  # the fields of EncoderShape, or a transformers config
    head: Head
    width: Size
    max_length: Size  # in tokens; longer texts are truncated


def save_model(folder: Path, model: EmbeddingModel, tokenizer_json: str, max_length: int) -> None:
    """Write the three files. `max_length` is in tokens."""
    from safetensors.torch import save_file

    save_file(unshared(model.weights()), folder / "model.safetensors")
    save_model_spec(folder, model, tokenizer_json, max_length)


def unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without shared memory, which safetensors rejects: T5's token table has two names."""
    seen: set[int] = set()
    copies = {}
    for name, tensor in state.items():
        is_new = tensor.data_ptr() not in seen
        seen.add(tensor.data_ptr())
        copies[name] = tensor.detach().contiguous() if is_new else tensor.detach().clone()
    return copies


def save_model_spec(folder: Path, model: EmbeddingModel, tokenizer_json: str, max_length: int) -> None:
    """Write `model.json` and `tokenizer.json`."""
    backbone: Any = model.backbone
    spec = ModelSpec(backbone.architecture, backbone.describe(), model.head, model.width, max_length)
    (folder / "model.json").write_text(json.dumps(asdict(spec), indent=2, sort_keys=True))
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")


def load_model(folder: Path) -> tuple[EmbeddingModel, Tokenizer]:
    """The model in evaluation mode, and its tokenizer, truncating at `max_length`. Raises OSError or ValueError."""
    if not is_ours(folder):
        from pipeline.model.hf_io import open_hf_folder

        return open_hf_folder(folder)[1:]
    from safetensors.torch import load_file as load_tensors

    from pipeline.model.embedding_model import unset_model

    spec, file = read_model_spec(folder), folder / "model.safetensors"
    with reading(file):
        weights = load_tensors(file)
    try:
        model = unset_model(spec, {name: tuple(tensor.shape) for name, tensor in weights.items()})
        model.load_weights(weights, assign=True)
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:  # torch's errors for sizes and types
        words = " ".join(str(error).split())
        raise ValueError(f"{folder}: model.json does not fit model.safetensors ({words}); copy them again") from None
    if model.width != spec.width:
        raise ValueError(
            f"{folder / 'model.json'}: found width {spec.width}, but the model's is {model.width}; copy it again"
        )
    return model.eval(), load_tokenizer(folder)


def is_ours(folder: Path) -> bool:
    """Whether `save_model` wrote the folder."""
    return (folder / "model.json").is_file()


def read_model_spec(folder: Path) -> ModelSpec:
    """Read `model.json`, or its equivalent. Raises OSError or ValueError if the folder holds no readable model."""
    if not is_ours(folder):
        from pipeline.model.hf_io import open_hf_folder

        return open_hf_folder(folder, weights=False)[0]
    try:
        spec = _spec_type().validate_json((folder / "model.json").read_bytes())
        is_table(spec), runs_padded(spec)  # read keys of the shape
    except (KeyError, ValueError):
        raise ValueError(f"{folder / 'model.json'} does not describe a model of this version") from None
    return spec


@cache
def _spec_type() -> TypeAdapter[ModelSpec]:
    return TypeAdapter(ModelSpec)


def runs_padded(spec: ModelSpec) -> bool:
    """Whether the backbone computes padding too."""
    return spec.architecture == "pretrained" and spec.shape["model_type"] not in FAMILIES


def is_table(spec: ModelSpec) -> bool:
    """Whether the model is only a token table: no layers, no learned positions, no projections."""
    is_unlayered = spec.architecture == "unified" and not spec.shape["num_layers"]
    return is_unlayered and spec.shape["positions"] == "rotary" and not spec.head.projections


def table_weights(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a token table, by name. Does not import torch for a folder that `save_model` wrote."""
    if is_ours(folder):
        file = folder / "model.safetensors"
        with reading(file):
            return load_file(file)  # type: ignore[no-any-return]
    from pipeline.model.hf_io import open_hf_folder

    return {name: tensor.numpy() for name, tensor in open_hf_folder(folder)[1].weights().items()}


def tensor_shapes(files: Iterable[Path]) -> Shapes:
    """The shapes of the tensors in safetensors files, from their headers. Raises OSError if one is damaged."""
    shapes = {}
    for file in files:
        with reading(file), safe_open(file, "numpy") as tensors:
            shapes.update({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})  # noqa: SIM118
    return shapes


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise OSError, which names the file, if a safetensors file is damaged."""
    try:
        yield
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise OSError(f"{file}: cannot read it ({error}); download it again") from None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The model's tokenizer, which truncates at `max_length`. Raises OSError or ValueError."""
    if not is_ours(folder):
        from pipeline.model.hf_io import open_hf_folder

        return open_hf_folder(folder, weights=False)[2]
    file = folder / "tokenizer.json"
    try:
        tokenizer = parse_tokenizer(file.read_text(encoding="utf-8"), file)
    except ValueError as error:
        raise ValueError(f"{file}: found no valid tokenizer ({error}); give a complete model") from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(read_model_spec(folder).max_length)
    return tokenizer


def model_fingerprint(folder: Path) -> str:
    """xxh3-128 of `model_files`: equal fingerprints mean equal vectors."""
    digest = xxhash.xxh3_128()
    for name in model_files(folder):
        digest.update(name.encode())
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def model_files(folder: Path) -> Sequence[str]:
    """The files that determine the vectors, relative to the folder."""
    if is_ours(folder):
        return FILES
    from pipeline.model.hf_io import hf_files

    return hf_files(folder)
