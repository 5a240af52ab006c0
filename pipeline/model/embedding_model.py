"""Token ids in, vectors out: a backbone, pooling and normalisation.

    model = EmbeddingModel(Encoder(shape), Head(pooling="mean"))
    vectors = model(pack([[5, 6, 7], [8]]))                      # (2, D) float32, unit length

The backbone is an `Encoder` or a `PretrainedEncoder`. The head has parameters only if it has projections. Cost: that of
the backbone.
"""

# Shapes: T packed tokens, N sequences, D width.
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from pipeline.model.folder import Head, ModelSpec, Pooling, Projection, Shapes
from pipeline.model.lora import is_adapted, merged
from pipeline.model.packing import Layout, Packed
from pipeline.model.transformer import Encoder, EncoderShape

PROJECTIONS = "projections."  # prefix of their weights in model.safetensors
RANDOM = (init.normal_, init.uniform_, init.kaiming_uniform_)  # initialise embeddings and linear layers


class Dense(nn.Module):
    """A `Projection` with weights, in the names of sentence-transformers' Dense."""

    def __init__(self, shape: Projection, in_width: int) -> None:
        super().__init__()
        self.shape = shape
        self.linear = nn.Linear(in_width, shape.width, bias=shape.bias)
        self.activation = getattr(nn, shape.activation)()
        if shape.residual and shape.width != in_width:
            self.residual = nn.Linear(in_width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x, dim=-1) if self.shape.unit_input else x
        projected = self.activation(self.linear(x))
        if not self.shape.residual:
            return projected  # type: ignore[no-any-return]
        return projected + (self.residual(x) if hasattr(self, "residual") else x)  # type: ignore[no-any-return]


class EmbeddingModel(nn.Module):
    """A backbone with a pooling head."""

    def __init__(self, backbone: nn.Module, head: Head | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head or Head()
        widths = [int(backbone.width), *(shape.width for shape in self.head.projections)]  # type: ignore[arg-type]
        self.projections = nn.Sequential(*map(Dense, self.head.projections, widths))
        self.width = widths[-1]

    @property
    def token_table(self) -> nn.Embedding:
        return self.backbone.token_table  # type: ignore[return-value]

    def hidden(self, batch: Packed, layout: Layout) -> Tensor:
        return self.backbone.hidden(batch, layout)  # type: ignore[operator, no-any-return]

    def forward(self, batch: Packed) -> Tensor:
        """(N, D) in float32; an empty sequence gives the zero vector."""
        layout = Layout.of(batch)
        return self.pooled(self.hidden(batch, layout), layout)

    def pooled(self, states_TD: Tensor, layout: Layout) -> Tensor:
        """(N, D): pool (T, D) states, and normalise if the head says so."""
        exact = states_TD if states_TD.dtype == torch.float64 else states_TD.float()
        vectors = self.finished(pool(exact, layout, self.head.pooling))
        return torch.where(layout.lengths[:, None] > 0, vectors, 0.0) if len(self.projections) else vectors

    def finished(self, pooled: Tensor) -> Tensor:
        """(N, D): project pooled states in their own precision, and normalise if the head says so."""
        with torch.autocast(pooled.device.type, enabled=False):
            vectors = self.projections(pooled)
        return F.normalize(vectors, dim=-1) if self.head.normalize else vectors

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, as in model.safetensors: the backbone's, adapters merged, and those of projections."""
        projections = {PROJECTIONS + name: tensor for name, tensor in self.projections.state_dict().items()}
        return {**merged(self.backbone.state_dict()), **projections}

    def load_weights(self, weights: dict[str, Tensor], *, assign: bool = False) -> None:
        """Load what `weights` returned. `assign`: use its tensors instead of copying them.

        A backbone with adapters keeps its weights, because those of a file have adapters merged.
        """
        of_projections = {name: weights[name] for name in weights if name.startswith(PROJECTIONS)}
        backbone = {name: tensor for name, tensor in weights.items() if name not in of_projections}
        if not is_adapted(self.backbone):
            self.backbone.load_state_dict(backbone, assign=assign)
        short = {name.removeprefix(PROJECTIONS): tensor for name, tensor in of_projections.items()}
        self.projections.load_state_dict(short, assign=assign)


def pool(states_TD: Tensor, layout: Layout, pooling: Pooling) -> Tensor:
    """(N, D): one row per sequence, zeros for an empty sequence."""
    lengths = layout.lengths
    if pooling in ("cls", "last"):
        end = lengths.cumsum(0)
        rows = (end - lengths if pooling == "cls" else end - 1).clamp(0, max(len(states_TD) - 1, 0))
        # An empty batch gives zeros that keep a gradient graph, which distributed backward passes need.
        picked = states_TD[rows] if len(states_TD) else states_TD.sum(dim=0).expand(len(lengths), -1)
        return torch.where(lengths[:, None] > 0, picked, 0.0)
    if pooling == "max":
        lowest = states_TD.new_full((len(lengths), states_TD.shape[-1]), -torch.inf)
        largest = lowest.scatter_reduce(0, layout.sequence[:, None].expand_as(states_TD), states_TD, "amax")
        return torch.where(lengths[:, None] > 0, largest, 0.0)
    total = lengths
    if pooling == "weighted":
        states_TD = states_TD * (layout.position + 1)[:, None]
        total = lengths * (lengths + 1) // 2
    summed = states_TD.new_zeros(len(lengths), states_TD.shape[-1]).index_add_(0, layout.sequence, states_TD)
    divisor = total.clamp(min=1)
    return summed / (divisor.sqrt() if pooling == "mean_sqrt_len" else divisor)[:, None]


def unset_model(spec: ModelSpec, shapes: Shapes) -> EmbeddingModel:
    """The model that a spec describes, without weights: call `load_weights(assign=True)`.

    `shapes` are those of the weights. Raises ValueError for an unknown architecture, or a larger model.
    """
    backbone = _unset_backbone(spec, shapes)
    with on_meta():
        return EmbeddingModel(backbone, spec.head)


def _unset_backbone(spec: ModelSpec, shapes: Shapes) -> nn.Module:
    if spec.architecture == "unified":
        shape = EncoderShape(**spec.shape)
        if shape.num_layers > len(shapes):  # each takes time, though on the meta device no memory
            raise ValueError(f"found num_layers {shape.num_layers:,}, but {len(shapes):,} weights")
        with on_meta():
            return Encoder(shape)
    if spec.architecture == "pretrained":
        from pipeline.model.pretrained import PretrainedEncoder, check_size  # imports transformers, which takes seconds

        check_size(spec.shape, shapes)
        return PretrainedEncoder.from_description(spec.shape)
    raise ValueError(f"found architecture {spec.architecture!r}; supported are unified and pretrained")


@contextmanager
def on_meta() -> Iterator[None]:
    """Create modules without memory for their weights."""
    with torch.device("meta"), _Unset():
        yield


class _Unset(TorchFunctionMode):
    """Skips random initialisation, for which torch would load its compiler on the meta device, which takes 2 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kwargs["tensor"] if func in RANDOM else func(*args, **(kwargs or {}))
