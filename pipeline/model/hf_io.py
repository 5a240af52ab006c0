"""Reads model folders of transformers, sentence-transformers and model2vec.

    spec, model, tokenizer = open_hf_folder(Path("all-MiniLM-L6-v2"))
    spec.head                                              # Head(pooling='mean', normalize=True, …)

    modules.json         Transformer and Pooling, or StaticEmbedding; then any number of Dense and Normalize
    config.json          without modules.json: transformers, or model2vec by its model_type

Vectors equal those of sentence-transformers; unsupported modules raise an error. Only JSON and safetensors are read,
and no code from the folder runs. A StaticEmbedding becomes an `Encoder` without layers, whose norm does nothing. Cost:
importing transformers takes seconds, even without weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, normalizers, processors
from torch import Tensor, nn

from pipeline.core.path import stays_below
from pipeline.core.tokenizer_files import parse_tokenizer
from pipeline.model.embedding_model import EmbeddingModel, on_meta
from pipeline.model.folder import ACTIVATIONS, SIZE_LIMIT, Activation, Head, ModelSpec, Pooling, Projection, reading
from pipeline.model.transformer import Encoder, EncoderShape

POOLINGS: dict[str, Pooling] = {
    "cls": "cls",
    "lasttoken": "last",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted",
}
"""sentence-transformers' `pooling_mode` → ours."""
FLAGS = {  # flags in 1_Pooling/config.json before sentence-transformers 6 → `pooling_mode` since then
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# NOTE: sentence-transformers documents these names, in this order, but it treats a missing `document` as an empty
# prompt (6.2), so it never uses the other names.
PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}
MAX_TOKENS_A_ROW = 1_000  # of a model2vec mapping, which the table in memory repeats
NO_NORM_EPS = 1e12
"""An epsilon of RMSNorm that its weights undo, if they are the root of it: x / 1e6 * 1e6."""


class FolderParts(NamedTuple):
    """Paths of a model's parts in its folder."""

    encoder: Path  # the folder with weights and tokenizer.json, and config.json unless it is static
    is_static: bool  # a token table: StaticEmbedding or model2vec
    pooling: Path | None = None  # the folder of the Pooling module; None in a transformers folder
    projections: tuple[tuple[Path, bool], ...] = ()  # folders of Dense modules; whether Normalize precedes each
    normalize: bool = True


def open_hf_folder(folder: Path, *, weights: bool = True) -> tuple[ModelSpec, EmbeddingModel, Tokenizer]:
    """The spec, the model in evaluation mode, and its tokenizer, which truncates at the spec's `max_length`.

    Without `weights`, the model is on the meta device. Raises OSError if a file is missing or unreadable, ValueError
    for an unsupported model or module, before reading any weights.
    """
    parts = _parts(folder)
    tokenizer, model = _tokenizer(parts), open_hf_model(folder, weights=weights)
    # The largest id, because a vocabulary may have gaps.
    rows, tokens = len(model.token_table.weight), 1 + max(tokenizer.get_vocab().values(), default=-1)
    backbone: Any = model.backbone
    if tokens > rows:
        raise ValueError(
            f"{parts.encoder}: found {tokens:,} tokens in tokenizer.json, but {rows:,} rows in the token table; give "
            "the model its own tokenizer"
        )
    max_length = _max_length(parts, tokenizer, backbone)
    side = _settings(parts.encoder / "tokenizer_config.json").get("truncation_side", "right")
    if side not in ["left", "right"] or not 0 < max_length < SIZE_LIMIT:
        raise ValueError(
            f"{parts.encoder}: found truncation_side {side!r} and a maximum of {max_length:,} tokens; supported are "
            f"left or right, and 1 to {SIZE_LIMIT - 1:,}"
        )
    tokenizer.enable_truncation(max_length, direction=side)
    described = backbone.describe()
    return ModelSpec(backbone.architecture, described, model.head, model.width, max_length), model, tokenizer


def open_hf_model(folder: Path, *, weights: bool = True) -> EmbeddingModel:
    """The model alone, in evaluation mode. Needs no tokenizer; else as `open_hf_folder`."""
    from pipeline.model.pretrained import load_pretrained, shape_of

    parts = _parts(folder)
    head = _head(folder, parts)
    if parts.is_static:
        backbone: nn.Module = _static_encoder(parts.encoder, weights)
    else:
        backbone = (load_pretrained if weights else shape_of)(parts.encoder)
    with on_meta():
        model = EmbeddingModel(backbone, head).eval()
    for (path, _), dense in zip(parts.projections, model.projections, strict=True):
        _load_dense(path, dense, weights)
    return model


def hf_files(folder: Path) -> list[str]:
    """The files that determine the vectors, relative to the folder, sorted. Raises as `open_hf_folder` does."""
    parts = _parts(folder)
    candidates = [folder / "modules.json", folder / "config_sentence_transformers.json"]
    candidates += [parts.pooling / "config.json"] if parts.pooling else []
    candidates += [path / name for path, _ in parts.projections for name in ("config.json", "model.safetensors")]
    candidates += [parts.encoder / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    for pattern in ("sentence_*_config.json", "model*.safetensors*"):
        candidates += parts.encoder.glob(pattern)
    return sorted(path.relative_to(folder).as_posix() for path in candidates if path.is_file())


def _parts(folder: Path) -> FolderParts:
    path = folder / "modules.json"
    if not path.is_file():
        if not (folder / "config.json").is_file():
            raise OSError(
                f"{folder}: found no model.json, modules.json or config.json; give the folder of a checkpoint, or of a "
                "sentence-transformers or transformers model"
            )
        config = _settings(folder / "config.json")
        is_static = config.get("model_type") == "model2vec"
        return FolderParts(folder, is_static, normalize=not is_static or bool(config.get("normalize", True)))
    content = _json(path)
    try:
        modules = [(str(module["type"]), folder / module["path"]) for module in content]
        real = [part.resolve() for _, part in modules]  # ValueError for a NUL or a lone surrogate
    except (TypeError, KeyError, ValueError, RuntimeError):
        raise ValueError(f"{path}: found no list of modules with type and path; give a complete model") from None
    # Shorten only sentence-transformers' own classes: custom code in a folder may use any name.
    names = [name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name for name, _ in modules]
    is_static = names[:1] == ["StaticEmbedding"]
    start = 1 if is_static else 2
    if not (is_static or names[:2] == ["Transformer", "Pooling"]) or {*names[start:]} - {"Dense", "Normalize"}:
        raise ValueError(
            f"{path}: found {', '.join(names) or 'no module'}; supported are Transformer and Pooling, or "
            "StaticEmbedding, of sentence-transformers, optionally followed by Dense and Normalize"
        )
    for (_, part), target in zip(modules, real, strict=True):
        is_below = part.is_relative_to(folder) and stays_below(str(part.relative_to(folder)))
        if not is_below or not target.is_relative_to(folder.resolve()):  # a link may lead out
            raise ValueError(f"{path}: found a module at {part}, outside the model's folder; give a complete model")
    projections, normalize = list[tuple[Path, bool]](), False
    for name, (_, part) in zip(names[start:], modules[start:], strict=True):
        if name == "Dense":
            projections.append((part, normalize))
        normalize = name == "Normalize"
    return FolderParts(modules[0][1], is_static, None if is_static else modules[1][1], tuple(projections), normalize)


def _head(folder: Path, parts: FolderParts) -> Head:
    prompts = _prompts(folder / "config_sentence_transformers.json")
    projections = tuple(_projection(path, unit_input) for path, unit_input in parts.projections)
    if parts.pooling is None:
        return Head(_default_pooling(parts), parts.normalize, prompts=prompts, projections=projections)
    path = parts.pooling / "config.json"
    content = _settings(path)
    if prompts and not content.get("include_prompt", True):
        raise ValueError(
            f"{path}: found include_prompt false; with prompts only true is supported, because a prompt's tokens are "
            "pooled with the text's"
        )
    modes = content.get("pooling_mode") or [mode for flag, mode in FLAGS.items() if content.get(flag)] or "mean"
    modes = modes if isinstance(modes, list) else [modes]
    if len(modes) != 1 or modes[0] not in [*POOLINGS]:
        raise ValueError(
            f"{path}: found pooling by {' and '.join(map(str, modes))}; supported is one of {', '.join(POOLINGS)}"
        )
    return Head(POOLINGS[modes[0]], parts.normalize, prompts=prompts, projections=projections)


def _default_pooling(parts: FolderParts) -> Pooling:
    """sentence-transformers' choice for a folder without modules: the last token of a causal language model."""
    config = {} if parts.is_static else _settings(parts.encoder / "config.json")
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return "last" if architecture.endswith("ForCausalLM") and config.get("is_causal", True) else "mean"


def _projection(path: Path, unit_input: bool) -> Projection:
    """The shape of a Dense module. Raises ValueError for one that only its own code could compute."""
    file = path / "config.json"
    content = _settings(file)
    package, _, activation = str(content.get("activation_function", "torch.nn.Tanh")).rpartition(".")
    if not package.startswith("torch.nn") or activation not in ACTIVATIONS:
        raise ValueError(
            f"{file}: found activation_function {content['activation_function']!r}; supported are torch.nn's "
            f"{', '.join(ACTIVATIONS)}"
        )
    places = {str(content.get(key) or "sentence_embedding") for key in ("module_input_name", "module_output_name")}
    width = content.get("out_features")
    if places != {"sentence_embedding"} or not isinstance(width, int) or not 0 < width < SIZE_LIMIT:
        raise ValueError(
            f"{file}: found {width!r} as out_features, {' and '.join(sorted(places))} as input and output; "
            "supported are Dense modules that project the sentence_embedding"
        )
    bias, residual = bool(content.get("bias", True)), bool(content.get("use_residual", False))
    return Projection(width, bias, cast(Activation, activation), residual, unit_input)


def _load_dense(path: Path, dense: nn.Module, weights: bool) -> None:
    """Load a Dense module's weights, or only check them without `weights`. Raises OSError or ValueError."""
    state = {name: tensor.float() for name, tensor in _safetensors(path).items()}
    expected = {name: tensor.shape for name, tensor in dense.state_dict().items()}
    if {name: tensor.shape for name, tensor in state.items()} != expected:
        sizes = ", ".join(f"{name} of {' x '.join(map(str, shape))}" for name, shape in expected.items())
        raise ValueError(
            f"{path}: its safetensors do not fit its config, which asks for {sizes}; give a complete model"
        )
    if weights:
        dense.load_state_dict(state, assign=True)


def _safetensors(folder: Path) -> dict[str, Tensor]:
    file = folder / "model.safetensors"
    if not file.is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "no weights"
        raise OSError(
            f"{folder}: found {found}, but no model.safetensors; other formats can run code when loaded, so give a "
            "model with safetensors, or convert it if you trust it"
        )
    with reading(file):
        return load_file(file)  # type: ignore[no-any-return]


def _static_encoder(folder: Path, weights: bool) -> Encoder:
    """A token table: StaticEmbedding's `embedding.weight`, or model2vec's `embeddings`, `mapping` and `weights`."""
    state = _safetensors(folder)
    rows_VD = state.get("embedding.weight", state.get("embeddings"))
    if rows_VD is None or rows_VD.ndim != 2 or not rows_VD.numel():
        raise ValueError(f"{folder}: found no table embedding.weight or embeddings in model.safetensors; give another")
    rows_VD, is_plain = rows_VD.float(), "embedding.weight" in state
    row_V = None if is_plain or "mapping" not in state else state["mapping"].long()
    weight_V = None if is_plain else state.get("weights")
    vocab_size, width = len(rows_VD) if row_V is None else row_V.numel(), rows_VD.shape[1]
    fits = row_V is None or (row_V.ndim == 1 and vocab_size and row_V.min() >= 0 and row_V.max() < len(rows_VD))
    if not fits or (weight_V is not None and weight_V.shape != (vocab_size,)):
        raise ValueError(f"{folder}: found a mapping or weights that do not fit the embeddings; give a complete model")
    if vocab_size > MAX_TOKENS_A_ROW * len(rows_VD):
        raise ValueError(
            f"{folder}: found a mapping of {vocab_size:,} tokens to {len(rows_VD):,} rows; supported are at most "
            f"{MAX_TOKENS_A_ROW} tokens a row"
        )
    rows_VD = rows_VD if row_V is None else rows_VD[row_V]
    rows_VD = rows_VD if weight_V is None else rows_VD * weight_V.float()[:, None]
    with on_meta():
        encoder = Encoder(EncoderShape(vocab_size, width, 0, num_heads=1, d_ff=width, norm_eps=NO_NORM_EPS))
    if weights:
        undo_D = torch.full((width,), NO_NORM_EPS**0.5)
        encoder.load_state_dict({"embed_tokens.weight": rows_VD.contiguous(), "norm.weight": undo_D}, assign=True)
    return encoder


def _prompts(path: Path) -> tuple[tuple[str, str], ...]:
    """The non-empty prompts of queries and documents."""
    given = _settings(path).get("prompts") or {}
    if not isinstance(given, dict) or not all(isinstance(prompt, str | None) for prompt in given.values()):
        raise ValueError(f"{path}: found prompts that are no mapping of names to texts; give a complete model")
    found = {ours: next((given[name] for name in names if given.get(name)), "") for ours, names in PROMPTS.items()}
    return tuple((ours, prompt) for ours, prompt in found.items() if prompt)


def _max_length(parts: FolderParts, tokenizer: Tokenizer, backbone: Any) -> int:
    """In tokens: sentence-transformers' limit, else the tokenizer's, but at most the model's number of positions."""
    from pipeline.model.pretrained import NO_LIMIT

    if parts.is_static:  # sentence-transformers obeys only tokenizer.json here
        return int((tokenizer.truncation or {}).get("max_length", NO_LIMIT))
    encoder, positions = parts.encoder, backbone.max_positions
    configured = [_settings(path).get("max_seq_length") for path in sorted(encoder.glob("sentence_*_config.json"))]
    limits = [*configured, _settings(encoder / "tokenizer_config.json").get("model_max_length"), positions]
    # NOTE: a tokenizer without a limit of its own has 1e30.
    return int(min(next((limit for limit in limits if isinstance(limit, int | float) and limit >= 1), 0), positions))


def _tokenizer(parts: FolderParts) -> Tokenizer:
    path = parts.encoder / "tokenizer.json"
    if not path.is_file():
        raise OSError(f"{parts.encoder}: found no tokenizer.json; give a model saved with a fast tokenizer")
    try:
        tokenizer = parse_tokenizer(path.read_text(encoding="utf-8"), path)
    except ValueError as error:
        raise ValueError(f"{path}: found no valid tokenizer ({error}); give a complete model") from None
    tokenizer.no_padding()
    if parts.is_static:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A")  # no special tokens
    elif any(_settings(path).get("do_lower_case") for path in parts.encoder.glob("sentence_*_config.json")):
        steps = [normalizers.Lowercase(), *([tokenizer.normalizer] if tokenizer.normalizer else [])]
        tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


def _settings(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty if the file does not exist."""
    content = _json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: found no valid JSON ({error}); give a complete model") from None
