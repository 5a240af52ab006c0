"""The `model` section: the encoder's size, set by one key or by several."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import PathStr, Section

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"d_model": 256, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4, "d_ff": 768},
    "small": {"d_model": 384, "num_layers": 6, "num_heads": 6, "num_kv_heads": 6, "d_ff": 1024},
    "base": {"d_model": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 12, "d_ff": 2048},
    "large": {"d_model": 1024, "num_layers": 24, "num_heads": 16, "num_kv_heads": 16, "d_ff": 2816},
    "1b": {"d_model": 2048, "num_layers": 20, "num_heads": 16, "num_kv_heads": 4, "d_ff": 5632},
    "7b": {"d_model": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "d_ff": 14336},
    "30b": {"d_model": 7168, "num_layers": 54, "num_heads": 56, "num_kv_heads": 8, "d_ff": 20480},
}
"""From `1b` on, the name is the parameter count with 32,000 tokens; the proportions follow Llama and Yi."""
TABLE_NORM_EPS, NORM_EPS = 1.0, 1e-5


class Lora(Section):
    """Adapters beside frozen linear layers (Hu et al. 2021). They want about ten times the learning rate."""

    rank: int = Field(16, ge=1)
    """Inner width of an adapter."""
    alpha: float = Field(32.0, gt=0)
    """An adapter's output is multiplied by alpha / rank."""
    targets: list[str] | None = None
    """Names, or ends of names, of the linear layers that get an adapter, such as [query, value]. By default all."""


class Model(Section):
    pretrained: PathStr | None = None
    """A pretrained model of transformers, sentence-transformers or model2vec: its folder, or its name on the hub.
    Replaces `size` and the other keys that shape our own encoder, except `num_layers`; `tokenizer.load_path` then
    defaults to the model's tokenizer. Dense modules are kept and trained."""
    lora: Lora | None = None
    """Trains adapters of the pretrained model, which is frozen, instead of its weights. Checkpoints and exports have
    them merged."""
    static_from: PathStr | None = None
    """A teacher for a token table: a model's folder, or its name on the hub. The table starts as the teacher's
    vectors of the tokens, reduced to `d_model` by PCA and weighted by the tokens' rarity in the data (model2vec)."""
    size: Literal["tiny", "small", "base", "large", "1b", "7b", "30b"] = "tiny"
    """Sets width, depth and heads; you can override each below."""
    d_model: int | None = Field(None, ge=8)
    """Width of the token states and of the vectors."""
    num_layers: Literal["auto"] | Annotated[int, Field(ge=0)] | None = None
    """Transformer layers; with 0, the default with `static_from`, the model is a token table. auto: layers if training
    has GPUs that train them within `training.max_time_s`, or else ten minutes; otherwise 0. With layers,
    `training.table_warmup_fraction` is then 0.5 unless you set it. A run keeps what it began with. With `pretrained`,
    how many of its layers to keep, spread evenly from the first to the last (DistilBERT, Sanh et al. 2019, section 3);
    by default all."""
    num_heads: int | None = Field(None, ge=1)
    """Attention heads per layer; d_model must be an even multiple of it."""
    num_kv_heads: int | None = Field(None, ge=1)
    """Key and value heads, each shared by a group of query heads; by default the size's, or `num_heads`."""
    d_ff: int | None = Field(None, ge=8)
    """Width of the feed-forward's hidden layer."""
    decoder_layers: int | None = Field(None, ge=1)
    """Layers of the decoder that generative objectives train; by default as many as the encoder has."""
    positions: Literal["rotary", "learned"] = "rotary"
    """How the encoder represents the order of tokens. A model with learned positions cannot be exported."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of each residual branch's output, in training."""
    norm_eps: float | None = Field(None, gt=0)
    """Epsilon of RMSNorm. By default 1 for `tiny` and with `static_from`, which preserves token weights
    (model/transformer.py), else 1e-5."""
    tie_embeddings: bool = True
    """The decoder shares the encoder's token embeddings, for its input and its output."""
    gradient_checkpointing: bool = False
    """Recompute a layer's states in the backward pass instead of keeping them: less memory, a third more time."""
    pooling: Literal["mean", "cls", "last", "weighted", "max", "mean_sqrt_len"] | None = None
    """How token states become a vector: their mean, the first token's, the last's, a mean weighted by position, the
    maximum, or their sum over the root of their number. By default the pretrained model's, else the mean."""
    normalize: bool = True
    """Vectors have unit length."""
    matryoshka_dims: list[Annotated[int, Field(ge=1)]] = []
    """Sizes, besides the full one, to which vectors can be truncated."""

    def dimensions(self) -> dict[str, int]:
        """d_model, num_layers, num_heads, num_kv_heads and d_ff, with the overrides applied; of `auto`, the size's."""
        chosen = {key: getattr(self, key) for key in SIZES[self.size] if getattr(self, key) not in (None, "auto")}
        if "num_heads" in chosen:
            chosen.setdefault("num_kv_heads", chosen["num_heads"])
        if self.static_from:
            chosen.setdefault("num_layers", 0)
        return SIZES[self.size] | chosen

    @property
    def epsilon(self) -> float:
        return self.norm_eps or (TABLE_NORM_EPS if self.size == "tiny" or self.static_from else NORM_EPS)

    @model_validator(mode="after")
    def _shapes_fit(self) -> Model:
        shape = self.dimensions()
        d_model, num_heads, num_kv_heads = shape["d_model"], shape["num_heads"], shape["num_kv_heads"]
        if d_model % (2 * num_heads):
            raise ValueError(f"a d_model that is an even multiple of num_heads, not {d_model} over {num_heads}")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads that are a multiple of num_kv_heads, not {num_heads} over {num_kv_heads}")
        if not self.pretrained and max(self.matryoshka_dims, default=0) >= d_model:
            raise ValueError(f"matryoshka_dims below d_model, {d_model}, not {self.matryoshka_dims}")
        if self.pretrained and self.static_from:
            raise ValueError("either pretrained or static_from, not both")
        if self.pretrained and self.positions == "learned":
            raise ValueError("positions=learned only for our own encoder, not with pretrained")
        if self.lora and not self.pretrained:
            raise ValueError("lora only with pretrained, the model that it adapts")
        return self

    @field_validator("matryoshka_dims")
    @classmethod
    def _falling(cls, sizes: list[int]) -> list[int]:
        return sorted(set(sizes), reverse=True)
