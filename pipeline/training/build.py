"""From a config and a tokenizer to what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from pipeline.config import Config, ConfigError
from pipeline.data.vocabulary import framing
from pipeline.model.batch import Special
from pipeline.model.decoder import Decoder, DecoderShape
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import Head
from pipeline.model.learner import Learner
from pipeline.model.transformer import Encoder, EncoderShape, gated_width, parameter_count
from pipeline.storage.files import fetched
from pipeline.storage.path import as_path

if TYPE_CHECKING:
    from pipeline.model.pretrained import PretrainedEncoder  # whose libraries our own encoder need not pay for


def build_learner(config: Config, tokenizer: Tokenizer, *, negatives: bool) -> Learner:
    """A fresh model, or a pretrained one, and the partners that the objectives need. Seed torch before.

    `negatives`: whether the records have hard negatives.
    """
    backbone = _pretrained(config) if config.model.pretrained else _unified(config, tokenizer)
    prompts = {"query": config.data.prompt("anchor"), "document": config.data.prompt("positive", "text")}
    head = Head(
        config.model.pooling,
        config.model.normalize,
        tuple(config.model.matryoshka_dims),
        tuple((name, prompt) for name, prompt in prompts.items() if prompt),
    )
    wanted = config.objective
    decoder = _decoder(config, backbone, tokenizer) if wanted.needs_decoder else None
    special = _special(tokenizer) if wanted.needs_decoder or wanted.mlm else None
    return Learner(EmbeddingModel(backbone, head), wanted, special, decoder, negatives=negatives)


def describe(learner: Learner) -> str:
    """How many parameters there are, and where."""
    whole, encoder = parameter_count(learner), parameter_count(learner.model)
    decoder = parameter_count(learner.decoder) if learner.decoder is not None else 0
    counts = {"encoder": encoder, "decoder": decoder, "heads": whole - encoder - decoder}
    listed = ", ".join(f"{count:,} in the {name}" for name, count in counts.items() if count)
    return f"{whole:,} parameters: {listed}"


def _unified(config: Config, tokenizer: Tokenizer) -> Encoder:
    wanted = config.model
    encoder = Encoder(
        EncoderShape(
            vocab_size=tokenizer.get_vocab_size(),
            dropout=wanted.dropout,
            norm_eps=wanted.epsilon,
            positions=wanted.positions,
            max_positions=config.tokenizer.max_length if wanted.positions == "learned" else None,
            **wanted.dimensions(),
        )
    )
    encoder.gradient_checkpointing = wanted.gradient_checkpointing
    if config.training.table_warmup_fraction:
        encoder.zero_residual_branches()
    return encoder


def _pretrained(config: Config) -> PretrainedEncoder:
    from pipeline.model.pretrained import load_pretrained

    backbone = load_pretrained(_place(config))
    if config.model.gradient_checkpointing:
        backbone.checkpoint_gradients()
    return backbone


def _place(config: Config) -> Path:
    """`model.pretrained` as a folder on this machine, or a name of the hub's."""
    return fetched(as_path(str(config.model.pretrained)))


def check_model(config: Config, tokenizer: Tokenizer) -> None:
    """Raise ConfigError where a tokenizer's tokens, texts or sizes of the config do not fit the model."""
    if config.objective.needs_decoder or config.objective.mlm:
        _special(tokenizer)
    if not config.model.pretrained:
        return
    from pipeline.model.pretrained import shape_of

    try:
        backbone = shape_of(_place(config))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.pretrained: {error}") from None
    table, longest, name = len(backbone.token_table.weight), config.tokenizer.max_length, config.model.pretrained
    if longest > backbone.max_positions:
        raise ConfigError(
            f"tokenizer.max_length: found {longest}; allowed with model.pretrained={name} are at most "
            f"{backbone.max_positions}"
        )
    if tokenizer.get_vocab_size() > table:
        raise ConfigError(
            f"tokenizer.load_path: found {tokenizer.get_vocab_size():,} tokens, and {table:,} rows in the table of "
            f"model.pretrained={name}; allowed is that model's own tokenizer"
        )
    if max(config.model.matryoshka_dims, default=0) >= backbone.width:
        raise ConfigError(
            f"model.matryoshka_dims: found {config.model.matryoshka_dims}; allowed are sizes below {backbone.width}"
        )


def _decoder(config: Config, backbone: Encoder | PretrainedEncoder, tokenizer: Tokenizer) -> Decoder:
    """A decoder of the encoder's width and depth, so that they can share a token table."""
    wanted, shape = config.model, config.model.dimensions()
    pretrained = not isinstance(backbone, Encoder)
    decoder = Decoder(
        DecoderShape(
            vocab_size=len(backbone.token_table.weight) if wanted.tie_embeddings else tokenizer.get_vocab_size(),
            d_model=backbone.width,
            num_layers=wanted.decoder_layers or max(len(backbone.layers), 1),
            num_heads=shape["num_heads"] if isinstance(backbone, Encoder) else backbone.num_heads,
            num_kv_heads=None if pretrained else shape["num_kv_heads"],
            d_ff=gated_width(backbone.width) if pretrained else shape["d_ff"],
            dropout=wanted.dropout,
            memory_width=backbone.width if {"seq2seq", "denoising"} & config.objective.named.keys() else None,
        ),
        tie_to=backbone.token_table if wanted.tie_embeddings else None,
    )
    decoder.gradient_checkpointing = wanted.gradient_checkpointing
    return decoder


def _special(tokenizer: Tokenizer) -> Special:
    found = framing(tokenizer)
    if found.start is None or found.end is None or found.mask is None:
        raise ConfigError(
            "tokenizer.load_path: found no tokens such as [CLS], [SEP] and [MASK], with which texts are framed and "
            "masked; allowed with seq2seq, denoising, mlm and causal objectives is a tokenizer that has them"
        )
    return Special(found.start, found.end, found.mask, found.special, tokenizer.get_vocab_size())
