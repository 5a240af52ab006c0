"""Reads model folders of transformers and sentence-transformers, and exports our models as one.

    spec, model, tokenizer = open_hf_folder(Path("all-MiniLM-L6-v2"))
    spec.head                                              # Head(pooling='mean', normalize=True, …)

    export_model(checkpoint, folder)                       # our encoder becomes EuroBERT; pretrained ones do not change
    SentenceTransformer(str(folder)).encode_query(["remove duplicate rows"])
    AutoModel.from_pretrained(folder)                      # the token states, before pooling

    config.json model.safetensors tokenizer.json tokenizer_config.json         transformers: mean pooling, unit length
    modules.json config_sentence_transformers.json 1_Pooling/config.json       sentence-transformers: as configured
    sentence_bert_config.json 2_Normalize/

Vectors equal those of sentence-transformers; unsupported modules raise an error. Only JSON and safetensors are read,
and no code from the folder runs. Cost: importing transformers takes seconds, even without weights.

Exports use the format that sentence-transformers has read since 2.2, and other embedding servers read too; 6.2 writes
other names for the same modules but still reads these. `export_model` loads the export with transformers and compares
the vectors before it returns, so the model is in memory twice.
"""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers

from pipeline.config import ConfigError
from pipeline.core.path import stays_below
from pipeline.core.tokenizer_files import encoding, parse_tokenizer
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import Head, ModelSpec, Pooling, load_model, read_model_spec
from pipeline.model.packing import Layout, pack

POOLINGS: dict[str, Pooling] = {"cls": "cls", "lasttoken": "last", "mean": "mean", "weightedmean": "weighted"}
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
MODULES = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
NAMED_TOKENS = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>")
CHECKED_TEXTS, CHECKED_TOKENS = 32, 64
MIN_COSINE = 0.9999


class FolderParts(NamedTuple):
    """Paths of a model's parts in its folder."""

    encoder: Path  # the folder with config.json, weights and tokenizer
    pooling: Path | None  # the folder of the Pooling module; None in a transformers folder
    normalize: bool


def open_hf_folder(folder: Path, *, weights: bool = True) -> tuple[ModelSpec, EmbeddingModel, Tokenizer]:
    """The spec, the model in evaluation mode, and its tokenizer, which truncates at the spec's `max_length`.

    Without `weights`, the model is on the meta device. Raises OSError if a file is missing or unreadable, ValueError
    for an unsupported model or module, before reading any weights.
    """
    from pipeline.model.pretrained import load_pretrained, shape_of

    parts = _parts(folder)
    head, tokenizer = _head(folder, parts), _tokenizer(parts.encoder)
    backbone = (load_pretrained if weights else shape_of)(parts.encoder)
    rows, tokens = len(backbone.token_table.weight), tokenizer.get_vocab_size()
    if tokens > rows:
        raise ValueError(
            f"{parts.encoder}: found {tokens:,} tokens in tokenizer.json, but {rows:,} rows in the token table; give "
            "the model its own tokenizer"
        )
    max_length = _max_length(parts.encoder, backbone.max_positions)
    side = _settings(parts.encoder / "tokenizer_config.json").get("truncation_side", "right")
    tokenizer.enable_truncation(max_length, direction=side)
    spec = ModelSpec("pretrained", backbone.describe(), head, backbone.width, max_length)
    return spec, EmbeddingModel(backbone, head).eval(), tokenizer


def hf_files(folder: Path) -> list[str]:
    """The files that determine the vectors, relative to the folder, sorted. Raises as `open_hf_folder` does."""
    parts = _parts(folder)
    candidates = [folder / "modules.json", folder / "config_sentence_transformers.json"]
    candidates += [parts.pooling / "config.json"] if parts.pooling else []
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
        return FolderParts(folder, None, normalize=True)
    try:
        modules = [(str(module["type"]), folder / module["path"]) for module in _json(path)]
    except (TypeError, KeyError):
        raise ValueError(f"{path}: found no list of modules with type and path; give a complete model") from None
    # Shorten only sentence-transformers' own classes: custom code in a folder may use any name.
    names = [name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name for name, _ in modules]
    if names not in MODULES:
        raise ValueError(
            f"{path}: found {', '.join(names) or 'no module'}; supported are Transformer and Pooling of "
            "sentence-transformers, optionally followed by Normalize"
        )
    for _, part in modules:
        is_below = part.is_relative_to(folder) and stays_below(str(part.relative_to(folder)))
        if not is_below or not part.resolve().is_relative_to(folder.resolve()):  # a link may lead out
            raise ValueError(f"{path}: found a module at {part}, outside the model's folder; give a complete model")
    return FolderParts(modules[0][1], modules[1][1], normalize=len(modules) == 3)


def _head(folder: Path, parts: FolderParts) -> Head:
    if parts.pooling is None:
        return Head()
    path = parts.pooling / "config.json"
    content, prompts = _settings(path), _prompts(folder / "config_sentence_transformers.json")
    if prompts and not content.get("include_prompt", True):
        raise ValueError(
            f"{path}: found include_prompt false; with prompts only true is supported, because a prompt's tokens are "
            "pooled with the text's"
        )
    modes = content.get("pooling_mode") or [mode for flag, mode in FLAGS.items() if content.get(flag)] or "mean"
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(
            f"{path}: found pooling by {' and '.join(map(str, modes))}; supported is one of {', '.join(POOLINGS)}"
        )
    return Head(POOLINGS[modes[0]], parts.normalize, prompts=prompts)


def _prompts(path: Path) -> tuple[tuple[str, str], ...]:
    """The non-empty prompts of queries and documents."""
    given = _settings(path).get("prompts") or {}
    found = {ours: next((given[name] for name in names if given.get(name)), "") for ours, names in PROMPTS.items()}
    return tuple((ours, prompt) for ours, prompt in found.items() if prompt)


def _max_length(encoder: Path, positions: int) -> int:
    """In tokens: sentence-transformers' limit, else the tokenizer's, but at most the model's number of positions."""
    configured = [_settings(path).get("max_seq_length") for path in sorted(encoder.glob("sentence_*_config.json"))]
    limits = [*configured, _settings(encoder / "tokenizer_config.json").get("model_max_length"), positions]
    # NOTE: a tokenizer without a limit of its own has 1e30.
    return min(int(next(limit for limit in limits if isinstance(limit, int | float) and limit >= 1)), positions)


def _tokenizer(encoder: Path) -> Tokenizer:
    path = encoder / "tokenizer.json"
    if not path.is_file():
        raise OSError(f"{encoder}: found no tokenizer.json; give a model saved with a fast tokenizer")
    try:
        tokenizer = parse_tokenizer(path.read_text(encoding="utf-8"), path)
    except ValueError as error:
        raise ValueError(f"{path}: found no valid tokenizer ({error}); give a complete model") from None
    tokenizer.no_padding()
    if any(_settings(path).get("do_lower_case") for path in encoder.glob("sentence_*_config.json")):
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
    except ValueError as error:
        raise ValueError(f"{path}: found no valid JSON ({error}); give a complete model") from None


def export_model(checkpoint: Path, folder: Path) -> float:
    """Export a model into a folder. Returns the smallest cosine between the export's vectors and the model's.

    Raises ConfigError if transformers has no such architecture, RuntimeError if the vectors differ.
    """
    spec, (model, tokenizer) = read_model_spec(checkpoint), load_model(checkpoint)
    pad_id = pad_token_id(spec, tokenizer)
    exported: Any = model.backbone.model if spec.architecture == "pretrained" else model.backbone
    if spec.architecture == "pretrained":
        from transformers import __version__

        config = {**spec.shape, "architectures": [type(exported).__name__], "transformers_version": __version__}
    else:
        config = eurobert_config(spec, tokenizer, pad_id)
    _write(folder / "config.json", config)
    state = {name: tensor.contiguous() for name, tensor in exported.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    # NOTE: safetensors makes the file readable only by its owner, but exports are for others.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    file = checkpoint / "tokenizer.json"
    whole = parse_tokenizer(file.read_text(encoding="utf-8"), file)
    whole.no_padding()
    whole.no_truncation()  # tokenizer_config.json has the limit
    whole.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", _tokenizer_config(spec, tokenizer, pad_id))
    _write_modules(spec, folder, "add_pooling_layer" in signature(type(exported)).parameters)
    return _smallest_cosine(model, tokenizer, folder)


def eurobert_config(spec: ModelSpec, tokenizer: Tokenizer, pad_id: int) -> dict[str, Any]:
    """Our encoder's shape as a EuroBERT config. Raises ConfigError for learned positions, which EuroBERT lacks."""
    from transformers import EuroBertConfig

    shape, mask_id = spec.shape, tokenizer.token_to_id("[MASK]")
    if shape.get("positions", "rotary") != "rotary":
        raise ConfigError(f"model.positions: found {shape['positions']}; exports need model.positions=rotary")
    config = EuroBertConfig(
        architectures=["EuroBertModel"],
        dtype="float32",
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_ff"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape.get("num_kv_heads") or shape["num_heads"],
        hidden_act="gelu",
        rms_norm_eps=shape["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
        max_position_embeddings=spec.max_length,
        pad_token_id=pad_id,
        bos_token_id=None,
        eos_token_id=None,
        mask_token_id=pad_id if mask_id is None else int(mask_id),
        use_cache=False,
    )
    return json.loads(config.to_json_string(use_diff=False))


def pad_token_id(spec: ModelSpec, tokenizer: Tokenizer) -> int:
    """A special token to pad with: the config's, else one by name, else the first. All give the same vectors.

    Raises ConfigError if the tokenizer has none: an ordinary word made special would be tokenized differently.
    """
    special = _special_tokens(tokenizer)
    if not special:
        raise ConfigError("found no special token to pad with; exports need a tokenizer that has one, such as [PAD]")
    own = [token_id for token_id in special.values() if token_id == spec.shape.get("pad_token_id")]
    by_name = [special[name] for name in PAD_TOKENS if name in special]
    return [*own, *by_name, *special.values()][0]


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Special tokens and their ids, by ascending id."""
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return {token.content: token_id for token_id, token in added if token.special}


def _tokenizer_config(spec: ModelSpec, tokenizer: Tokenizer, pad_id: int) -> dict[str, Any]:
    """Settings that make AutoTokenizer use tokenizer.json unchanged, truncating at the model's length.

    NOTE: `PreTrainedTokenizerFast` reads tokenizer.json as it is; model-specific classes rebuild parts of it.
    """
    special = _special_tokens(tokenizer)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: token for role, token in NAMED_TOKENS.items() if token in special},
        "pad_token": tokenizer.id_to_token(pad_id),
        "model_max_length": spec.max_length,
        "padding_side": "right",
        "truncation_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def _write_modules(spec: ModelSpec, folder: Path, has_pooler: bool) -> None:
    """Write sentence-transformers' files. `has_pooler`: the class adds an unused, random pooling layer by default."""
    head = spec.head
    paths = {"Transformer": "", "Pooling": "1_Pooling", **({"Normalize": "2_Normalize"} if head.normalize else {})}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(paths.items())
    ]
    _write(folder / "modules.json", modules)
    without_pooler = {"model_args": {"add_pooling_layer": False}} if has_pooler else {}
    loading = {"max_seq_length": spec.max_length, "do_lower_case": False, **without_pooler}
    _write(folder / "sentence_bert_config.json", loading)
    prompts = {name: head.prompt(name) for name in PROMPTS}
    settings = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write(folder / "config_sentence_transformers.json", settings)
    modes = {flag: POOLINGS.get(mode) == head.pooling for flag, mode in FLAGS.items()}
    pooling = {"word_embedding_dimension": spec.width, **modes, "include_prompt": True}
    _write(folder / "1_Pooling" / "config.json", pooling)
    if head.normalize:
        _write(folder / "2_Normalize" / "config.json", {})


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.inference_mode()
def _smallest_cosine(model: EmbeddingModel, tokenizer: Tokenizer, folder: Path) -> float:
    """The smallest cosine between our vectors and the export's, on random texts. Raises RuntimeError if too small."""
    from transformers import AutoModel, AutoTokenizer

    from pipeline.model.pretrained import quiet_transformers

    texts = _random_texts(tokenizer)
    with encoding(tokenizer):
        sequences = [encoded.ids for encoded in tokenizer.encode_batch(texts)]
    their_tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if their_tokenizer(texts, truncation=True)["input_ids"] != sequences:
        raise RuntimeError("the exported tokenizer gives different ids than the model's own; please report this bug")
    with quiet_transformers():
        theirs = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    batch = their_tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    states_TD = theirs(**batch).last_hidden_state[batch["attention_mask"].bool()]
    packed = pack(sequences)
    cosine = float(F.cosine_similarity(model(packed), model.pooled(states_TD, Layout.of(packed))).min())
    if not cosine >= MIN_COSINE:
        raise RuntimeError(
            f"found cosine {cosine:.6f} between an exported vector and the model's own; please report this bug"
        )
    return cosine


def _random_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts of about 1 to CHECKED_TOKENS random tokens, the same on every call, without empty ones."""
    chance = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, CHECKED_TOKENS, (CHECKED_TEXTS,), generator=chance).tolist()
    size = tokenizer.get_vocab_size()
    texts = tokenizer.decode_batch([torch.randint(size, (n,), generator=chance).tolist() for n in lengths])
    with encoding(tokenizer):
        return [text for text, encoded in zip(texts, tokenizer.encode_batch(texts), strict=True) if encoded.ids]
