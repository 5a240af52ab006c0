"""LoRA: trains low-rank matrices beside a pretrained encoder's frozen linear layers (Hu et al. 2021), through peft.

    add_lora(backbone, rank=16, alpha=32, targets=["query", "value"])      # only B and A have gradients from here on
    merged(backbone.state_dict())                                          # W + B A alpha / rank, by the base's names

Cost: gradients and optimizer states of rank x (inputs + outputs) numbers per layer instead of inputs x outputs, and two
small products more in each pass.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

SCALE = "lora_scale"  # a buffer of the backbone, so that a checkpoint's shards can be merged without its config
FACTORS = (".lora_A.default.", ".lora_B.default.")
BASE = ".base_layer."


def add_lora(backbone: nn.Module, rank: int, alpha: float, targets: Iterable[str] | None) -> None:
    """Freeze the backbone and add adapters to its linear layers whose names end with a target; None: to all.

    B starts at zero, so the states do not change; seed torch before, for A. Raises ValueError for targets that match
    no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes a second

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=matched(backbone, targets)), backbone)
    backbone.register_buffer(SCALE, torch.tensor(alpha / rank))


def matched(backbone: nn.Module, targets: Iterable[str] | None) -> list[str]:
    """The names of the linear layers that end with a target; None: of all. Raises ValueError for one without any."""
    names = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    found = {target: [name for name in names if f".{name}".endswith(f".{target}")] for target in targets or ()}
    empty = [target for target, layers in found.items() if not layers]
    if empty or not names or (targets is not None and not found):
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
        raise ValueError(f"found {', '.join(empty) or 'no target'}; the model's linear layers are {ends}")
    return names if targets is None else sorted({name for layers in found.values() for name in layers})


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of a matrix that LoRA trains."""
    return any(factor in name for factor in FACTORS)


def is_adapted(backbone: nn.Module) -> bool:
    return hasattr(backbone, SCALE)


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's state dict with its adapters added to the weights; as it is if it has none."""
    if SCALE not in state:
        return state
    result = {}
    for name, tensor in state.items():
        if name == SCALE or is_adapter(name):
            continue
        layer, is_base, rest = name.rpartition(BASE)
        if is_base and rest == "weight":
            down, up = (state[f"{layer}{factor}weight"] for factor in FACTORS)
            tensor = tensor + up @ down * state[SCALE]
        result[f"{layer}.{rest}" if is_base else name] = tensor
    return result
