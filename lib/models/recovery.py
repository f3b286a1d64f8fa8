"""Training that keeps the zeros of a pruned model: full, or by LoRA adapters that are masked as the weights are.

Adapters alone lose the sparsity: merging adds a dense product to the weights, and zeroing it afterwards leaves a model that
nobody has trained. Here the product is masked in every forward pass, so what is trained is what is merged.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call
from transformers import TrainerCallback

from lib.errors import InvalidInput
from lib.models.decoder import Decoder
from lib.models.matrices import Matrix


class KeepZeros(TrainerCallback):
    """A callback of transformers' `Trainer` that zeroes, after every optimizer step, the weights that were zero before training.

    Args:
        decoder: a pruned model in memory. Every zero of its blocks' matrices counts, whoever made it.
    """

    def __init__(self, decoder: Decoder):
        self.masks: dict[str, tuple[Matrix, torch.Tensor]] = {}  # full name -> (matrix, mask (out, in), True = zero)
        for i, prefix in enumerate(decoder.prefixes):
            for name, matrix in (decoder.linears(i) | decoder.routers(i)).items():
                self.masks[prefix + name] = matrix, matrix.weight == 0

    def on_train_begin(self, training, state, control, **kwargs):
        if training.fsdp or training.deepspeed:
            raise InvalidInput("FSDP and DeepSpeed shard weights, and zeros are kept in whole ones: train without them")

    @torch.no_grad()
    def on_optimizer_step(self, *args, **kwargs):
        for matrix, mask in self.masks.values():
            matrix.weight.masked_fill_(mask, 0)

    @torch.no_grad()
    def keep_others(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Survivors that would be zero in the dtype of `saved`, {tensor name: tensor}, become the smallest that it can hold."""
        for name, (matrix, mask) in self.masks.items():
            dtype = saved[name.removesuffix(matrix.name) + matrix.tensor_name].dtype
            info, weight = torch.finfo(dtype), matrix.weight
            lost = ~mask & (weight.to(dtype) == 0)
            weight.copy_(torch.where(lost, torch.copysign(torch.full_like(weight, info.tiny * info.eps), weight), weight))


def add_adapters(decoder: Decoder, keep: KeepZeros, rank: int) -> nn.Module:
    """The model with LoRA adapters (arXiv 2106.09685) on its blocks' linears, each masked as its weight is.

    Stacks of experts have none. `merge_and_unload()` of the result adds the adapters to the weights.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InvalidInput("LoRA needs peft: pip install -r requirements-finetune.txt, or leave out --lora") from error
    names = [
        prefix + name
        for i, prefix in enumerate(decoder.prefixes)
        for name, matrix in decoder.linears(i).items()
        if matrix.index is None
    ]
    adapted = get_peft_model(decoder.model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))
    for name in names:
        matrix, mask = keep.masks[name]
        _mask(decoder.model.get_submodule(name), matrix.oriented(mask))
    return adapted


def _mask(layer: nn.Module, mask: torch.Tensor) -> None:
    """Mask an adapter in what it adds to its linear's weight, in training as in merging; `mask` is as the weight is stored."""
    linear, (adapter,) = layer.get_base_layer(), layer.active_adapters
    dense = layer.get_delta_weight

    def delta(name: str) -> torch.Tensor:
        return dense(name).masked_fill(mask, 0)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        return functional_call(linear, {"weight": linear.weight + delta(adapter)}, (inputs,))

    layer.get_delta_weight, layer.forward = delta, forward
