"""Makes a pretrained encoder shallower: keeps some of its layers, as a student to distil into.

    backbone = load_pretrained("sentence-transformers/all-MiniLM-L6-v2")        # 6 layers
    keep_layers(backbone, 3)                                                    # the first, the third and the last

A student that begins with its teacher's own layers learns in a fraction of the steps that a new one needs (DistilBERT,
Sanh et al. 2019, section 3).
"""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.model.pretrained import PretrainedEncoder


def keep_layers(backbone: nn.Module, count: int) -> None:
    """Drop layers until `count` are left, spread evenly from the first to the last.

    Raises ValueError if the model has fewer, or layers that cannot be dropped.
    """
    if not isinstance(backbone, PretrainedEncoder):
        raise ValueError(f"found {count}, but the model is a token table, which has no layers; leave it out")
    config, found = backbone.model.config, int(backbone.model.config.num_hidden_layers)
    stacks = [
        stack
        for stack in backbone.model.modules()
        if isinstance(stack, nn.ModuleList) and all(isinstance(each, GradientCheckpointingLayer) for each in stack)
    ]
    if [len(stack) for stack in stacks] != [found]:  # such as ALBERT's, which repeats one layer
        raise ValueError(f"found {count}, but a {config.model_type} model's layers cannot be dropped; leave it out")
    if not 0 < count <= found:
        raise ValueError(f"found {count}; allowed are 1 to {found}, the model's layers")
    kept = [round(number * (found - 1) / max(count - 1, 1)) for number in range(count)]
    for number in sorted({*range(found)} - {*kept}, reverse=True):
        del stacks[0][number]
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == found and hasattr(config, key):  # such as layer_types
            setattr(config, key, [value[number] for number in kept])
    config.num_hidden_layers = count
