"""Runs transformers' text encoders: the families in FAMILIES on packed tokens, without padding, all others padded.

    backbone = load_pretrained("sentence-transformers/all-MiniLM-L6-v2")       # or a folder; safetensors only
    batch = pack([[101, 7592, 102], [101, 2088, 999, 102]])
    states = backbone.hidden(batch, Layout.of(batch))                          # (7, 384)

For a packed batch, transformers runs one row of T tokens with the positions that we pass, and calls our attention,
which separates the sequences. The states equal those of padded sequences; tests check this for each family. Others run
on N rows of L tokens, padded on the right, with a mask. Cost: importing transformers takes seconds; padding is computed
too.
"""

# Shapes: T packed tokens, N sequences, L tokens of the longest, D width, H heads, J key-value heads, K head width.
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
    __version__,
)
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from pipeline.core.path import stays_below
from pipeline.model.attention import AttentionOptions, attend
from pipeline.model.folder import CAUSAL_FAMILIES, FAMILIES, Shapes, tensor_shapes
from pipeline.model.linear import use_onednn
from pipeline.model.packing import Layout, Packed, scatter_rows

OFFSET = (  # count positions from the padding token's id + 1, as fairseq does
    "camembert",
    "data2vec-text",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
DECODER_KEYS = ("is_decoder", "is_causal", "add_cross_attention")
SIZES = ("num_hidden_layers", "max_position_embeddings")
NO_LIMIT = 1 << 30  # tokens: longer than any text
ATTENTION = "packed"  # our attention's name in transformers
FREE_NUMBERS = 1 << 20  # in buffers, which files need not hold
MAX_POSITIONS = 1 << 24  # Llama 4, the longest in 2025, has 10M
NOT_DESCRIBED = ("_name_or_path", "auto_map", "transformers_version")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    **given: Any,
) -> tuple[Tensor, None]:
    """Called by transformers: (1, H, T, K) queries, (1, J, T, K) keys and values → (1, T, H, K)."""
    q_THK, k_TJK, v_TJK = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    # transformers' window includes the query's own position.
    window = given["sliding_window"] - 1 if given.get("sliding_window") else None
    causal = getattr(module, "is_causal", False) and getattr(module.config, "is_causal", True) is not False
    options = AttentionOptions(causal, window, given.get("dropout", 0.0), given.get("scaling"))
    return attend(q_THK, k_TJK, v_TJK, layout, layout, options).unsqueeze(0), None


# NOTE: transformers builds no mask for an attention name without a mask function (masking_utils).
AttentionInterface.register(ATTENTION, _attention)


class PretrainedEncoder(nn.Module):
    """A transformers model as a backbone: packed token ids in, one state per token out."""

    architecture = "pretrained"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.is_packed = model.config.model_type in FAMILIES
        model.config.use_cache = False  # of keys and values, for generation
        use_onednn(model)

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> PretrainedEncoder:
        """Build the model that `describe` described, without weights: call `load_state_dict`. Raises ValueError."""
        config = _config(description, "model.json")
        # NOTE: not on the meta device, because it computes buffers outside the state dict, such as rotary frequencies.
        with _describing("model.json", config), no_init_weights():
            return cls(_loader(config, "model.json").from_config(config, **_options(config)))

    def describe(self) -> dict[str, Any]:
        """The transformers config as JSON, without its version and path."""
        described: dict[str, Any] = json.loads(self.model.config.to_json_string(use_diff=False))
        return {key: value for key, value in described.items() if key not in NOT_DESCRIBED}

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def num_heads(self) -> int:
        return int(self.model.config.num_attention_heads)

    @property
    def layers(self) -> nn.ModuleList:
        return nn.ModuleList(m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer))

    @property
    def token_table(self) -> nn.Embedding:
        return self.model.get_input_embeddings()  # type: ignore[return-value]

    @property
    def max_positions(self) -> int:
        """The longest sequence that the model has positions for, in tokens; NO_LIMIT if they are relative."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or NO_LIMIT
        return int(limit) - self._first_position if 0 < limit < NO_LIMIT else NO_LIMIT

    @property
    def _first_position(self) -> int:
        config = self.model.config
        return int(config.pad_token_id) + 1 if config.model_type in OFFSET else 0

    def checkpoint_gradients(self) -> None:
        """In training, store only each layer's input; the backward pass runs it again with the same dropout.

        Raises ValueError if transformers cannot do this with the model.
        """
        if not self.model.supports_gradient_checkpointing:
            raise ValueError(f"found a {self.model.config.model_type} model, which transformers cannot checkpoint")
        self.model.activation_checkpointing_enable({"use_reentrant": False})

    def hidden(self, batch: Packed, layout: Layout) -> Tensor:
        """The last layer's states, (T, D)."""
        if not layout.num_tokens:
            # transformers rejects empty batches, but under FSDP every worker must run the layers.
            return self._states(*_one_token(batch.ids.device))[:0]
        if not self.is_packed or layout.by_length is None:
            return self._states(batch.ids, layout)
        rows, ordered = layout.by_length
        return scatter_rows(self._states(batch.ids[rows], ordered), rows, layout.num_tokens)

    def _states(self, ids_T: Tensor, layout: Layout) -> Tensor:
        return self._packed_states(ids_T, layout) if self.is_packed else self._padded_states(ids_T, layout)

    def _packed_states(self, ids_T: Tensor, layout: Layout) -> Tensor:
        positions_T = layout.position + self._first_position
        output = self.model(
            input_ids=ids_T.unsqueeze(0), position_ids=positions_T.unsqueeze(0), use_cache=False, layout=layout
        )
        return output.last_hidden_state.squeeze(0)  # type: ignore[no-any-return]

    def _padded_states(self, ids_T: Tensor, layout: Layout) -> Tensor:
        mask_NL, config = layout.mask.clone(), self.model.config
        ids_NL = layout.pad(ids_T).masked_fill(~mask_NL, getattr(config, "pad_token_id", None) or 0)
        mask_NL[:, 0] = True  # also in an empty sequence: attention to no key at all is NaN
        states = getattr(self.model(input_ids=ids_NL, attention_mask=mask_NL.long()), "last_hidden_state", None)
        if states is None or states.shape != (*ids_NL.shape, self.width):
            raise ValueError(
                f"found a {config.model_type} model, which gives no state of {self.width} numbers per token; give "
                "another text encoder"
            )
        return layout.unpad(states)


def _one_token(device: torch.device) -> tuple[Tensor, Layout]:
    return torch.zeros(1, dtype=torch.int64, device=device), Layout(torch.arange(2, device=device), 1)


def load_pretrained(name_or_dir: str | Path) -> PretrainedEncoder:
    """Load a model from the Hugging Face hub or a folder, in float32 and evaluation mode.

    Raises OSError if it is missing or unreadable, ValueError if transformers does not know it, if it is no text
    encoder, or incomplete.
    """
    folder, config, _ = _opened(name_or_dir)
    with quiet_transformers(), _describing(name_or_dir, config):
        model, report = _loader(config, name_or_dir).from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below
            trust_remote_code=False,
            output_loading_info=True,
            **_options(config),
        )
    unset = sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"])
    if unset:
        raise ValueError(
            f"{name_or_dir}: its safetensors lack {len(unset)} weights of the {config.model_type} model in its "
            f"config.json, or have them in other sizes, such as {unset[0]}; give a complete model"
        )
    return PretrainedEncoder(model).eval()


def shape_of(name_or_dir: str | Path) -> PretrainedEncoder:
    """The same model on the meta device, without its weights. Raises as `load_pretrained` does."""
    return PretrainedEncoder(_opened(name_or_dir)[2])


def check_size(description: dict[str, Any], shapes: Shapes) -> None:
    """Raise ValueError if `describe` described a larger model than weights of these shapes can fill."""
    _on_meta(_config(description, "model.json"), shapes, "model.json")


def fetch(name_or_dir: str | Path) -> Path:
    """Return the folder, or download a hub model's config, tokenizer and safetensors and return their folder.

    Raises OSError if neither exists.
    """
    name, folder = str(name_or_dir), Path(name_or_dir).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_NAME.fullmatch(name):
        raise OSError(f"{name}: no such folder, and hub models have names like owner/model")
    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "model*.safetensors", "[0-9]_*/model*.safetensors"])
        )
    except (OSError, HTTPError) as error:
        raise OSError(f"{name}: {_unfetched(error)}, or give a model's folder") from None


def _unfetched(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "a gated hub model; accept its terms and set HF_TOKEN in the environment"
    if isinstance(error, RepositoryNotFoundError):
        return "no such folder, and no such model on the hub without HF_TOKEN; check the name"
    words = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
    return f"no such folder, and the hub is unreachable ({words}); check the network"


def _opened(name_or_dir: str | Path) -> tuple[Path, PretrainedConfig, PreTrainedModel]:
    """The folder, its config, and the model on the meta device. Raises if the folder has no safetensors."""
    folder = fetch(name_or_dir)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{name_or_dir}: found an adapter of peft; merge it into its base, and give the merged model")
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OSError(f"{name_or_dir}: found no config.json; give the folder of a transformers model") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name_or_dir}: its config.json is not JSON ({error}); give a complete model") from None
    config = _config(described if isinstance(described, dict) else {}, name_or_dir)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        found = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "no weights"
        raise OSError(
            f"{name_or_dir}: found {found}, but no model.safetensors; other formats can run code when loaded, so give "
            "a model with safetensors, or convert it if you trust it"
        )
    _check_shards(folder)
    return folder, config, _on_meta(config, tensor_shapes(files), name_or_dir)


def _on_meta(config: PretrainedConfig, shapes: Shapes, name: str | Path) -> PreTrainedModel:
    """Build the model without memory. Raises ValueError if it is larger than weights of these shapes can fill."""
    with _describing(name, config), torch.device("meta"), no_init_weights():
        layers, positions = (int(getattr(config, key, None) or 0) for key in SIZES)
        # Each layer takes time, and some models compute a table of positions in Python.
        is_small = layers <= len(shapes) and positions <= MAX_POSITIONS
        model = _loader(config, name).from_config(config, **_options(config)) if is_small else None
    if model is None:
        raise ValueError(
            f"{name}: found {SIZES[0]} {layers:,} and {SIZES[1]} {positions:,} in its config; its files have "
            f"{len(shapes):,} weights, and at most {MAX_POSITIONS:,} positions are supported; give a complete model"
        )
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = sum(prod(shape) for shape in shapes.values())
    if described > stored + FREE_NUMBERS:
        raise ValueError(
            f"{name}: its config describes {described:,} numbers, but its safetensors hold {stored:,}; give a complete "
            "model"
        )
    return model  # type: ignore[no-any-return]


@contextmanager
def _describing(name: str | Path, config: PretrainedConfig) -> Iterator[None]:
    """Raise ValueError for whatever a wrong value in a config leads to in transformers; OSError for damaged files."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{name}: cannot read its safetensors ({error}); download them again") from None
    except Exception as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{name}: its config does not describe a {config.model_type} model: {words}") from None


def _check_shards(folder: Path) -> None:
    """Raise ValueError if an index of weights names a file outside the folder."""
    for path in folder.glob("*.safetensors.index.json"):
        try:
            shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: found no weight_map from weights to files; give a complete model") from None
        if outside := [shard for shard in shards if not isinstance(shard, str) or not stays_below(shard)]:
            raise ValueError(
                f"{path}: found weights in {outside[0]}, outside the model's folder; give a complete model"
            )


def _config(described: dict[str, Any], name: str | Path) -> PretrainedConfig:
    """The config of a text encoder. Raises ValueError for any other model."""
    family = described.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise ValueError(
            f"{name}: found model_type {family!r}, which transformers {__version__} does not know; give a model of an "
            "architecture that is part of transformers"
        )
    for key in DECODER_KEYS if family in FAMILIES and family not in CAUSAL_FAMILIES else ():
        if described.get(key):
            raise ValueError(f"{name}: found {key} true; only encoders of the {family} family are supported")
    if str(described.get("position_embedding_type")).startswith("relative"):
        raise ValueError(f"{name}: found relative positions, which transformers 5 does not support; give another model")
    try:
        config = AutoConfig.for_model(**described)
    except Exception as error:  # whatever a wrong value leads to in transformers
        words = " ".join(str(error).split())
        raise ValueError(f"{name}: its config does not describe a {family} model: {words}") from None
    _loader(config, name)
    return config  # type: ignore[no-any-return]


def _loader(config: PretrainedConfig, name: str | Path) -> Any:
    """AutoModel, or its counterpart for the encoder of an encoder-decoder model. Raises ValueError for other models."""
    kind, model_class = type(config), MODEL_MAPPING.get(type(config), None)
    inputs: Any = signature(model_class.forward).parameters if isinstance(model_class, type) else {}
    is_text = "input_ids" in inputs and "pixel_values" not in inputs
    has_sizes = all(isinstance(getattr(config, key, None), int) for key in ("hidden_size", "num_attention_heads"))
    if is_text and has_sizes and "decoder_input_ids" not in inputs:
        return AutoModel
    if is_text and has_sizes and kind in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return AutoModelForTextEncoding
    raise ValueError(f"{name}: found a {config.model_type} model, which has no text encoder; give a text encoder")


def _options(config: PretrainedConfig) -> dict[str, Any]:
    """Keyword arguments for creating a model, in addition to its config."""
    packed = {"attn_implementation": ATTENTION} if config.model_type in FAMILIES else {}
    model_class: Any = MODEL_MAPPING[type(config)]
    has_pooler = "add_pooling_layer" in signature(model_class).parameters  # a layer that we skip
    return packed | ({"add_pooling_layer": False} if has_pooler else {})


def open_exported(folder: Path, **options: Any) -> PreTrainedModel:
    """transformers' own model in an exported folder, in evaluation mode, with transformers' attention."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with quiet_transformers():
        loader = _loader(config, folder)
        return loader.from_pretrained(folder, local_files_only=True, **options).eval()  # type: ignore[no-any-return]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and warnings about weights that we skip on purpose, such as the pooling layer's."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
