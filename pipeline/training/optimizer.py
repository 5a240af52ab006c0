"""AdamW over a learner's parameters, in groups that differ in peak rate, decay and the step at which they join.

    optimizer = build_optimizer(learner, config.training)
    Schedule.of(config.training, total_steps).apply(optimizer, step=0)      # each group's rate, from its `peak`

Cost: two float32 moments a parameter, 8 bytes.
"""

from __future__ import annotations

import torch
from torch import nn

from pipeline.config.training import Training
from pipeline.model.learner import Learner
from pipeline.model.transformer import Encoder


def build_optimizer(learner: Learner, settings: Training) -> torch.optim.AdamW:
    """AdamW with decoupled decay on weight matrices alone: none on norms, biases and tables of embeddings.

    A table's rows would decay at every step, whether or not their token occurs. Groups carry `peak`, their rate at its
    highest, and `layers`: whether they join after the token table's warm-up.
    """
    backbone, joining = learner.model.backbone, set[nn.Parameter]()
    if isinstance(backbone, Encoder):
        joining = set(backbone.layers.parameters())
    token_table, tables = learner.model.token_table.weight, _tables(learner)
    groups: dict[tuple[float, float, bool, type], list[nn.Parameter]] = {}
    # fsdp's parameters are DTensors, scalars excepted: an optimizer updates a group of one type at once, and torch's
    # GradScaler takes the first gradient of all for a DTensor.
    trained = sorted((p for p in learner.parameters() if p.requires_grad), key=lambda p: type(p) is nn.Parameter)
    for parameter in trained:
        peak = settings.learning_rate
        if parameter is token_table:
            peak = settings.table_learning_rate or peak
        decay = settings.weight_decay if parameter.ndim > 1 and parameter not in tables else 0.0
        groups.setdefault((peak, decay, parameter in joining, type(parameter)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "lr": peak, "peak": peak, "weight_decay": decay, "layers": layers}
            for (peak, decay, layers, _), members in groups.items()
        ],
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.adam_eps,
        fused=True,
    )


def _tables(learner: Learner) -> set[torch.Tensor]:
    """Weights of embeddings: tokens, learned positions, segments of a pretrained model."""
    return {module.weight for module in learner.modules() if isinstance(module, nn.Embedding)}
