"""Training that keeps the zeros of a pruned model: of all weights, or of LoRA adapters that are masked as the weights are.

Plain adapters lose the sparsity, because merging adds a dense product to the weights. Zeroing the merged weights would leave
a model that was never trained. Here the product is masked in every forward pass, so what is trained is what is merged.
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
    """A callback of transformers' `Trainer`: after every optimizer step, weights that were zero before training become zero.

    Args:
        decoder: a pruned model in memory. Every zero in its blocks' matrices counts, whatever made it.
    """

    def __init__(self, decoder: Decoder):
        self.masks: dict[str, tuple[Matrix, torch.Tensor]] = {}  # full name -> (matrix, mask (out, in), True = zero)
        for i, prefix in enumerate(decoder.prefixes):
            for name, matrix in (decoder.linears(i) | decoder.routers(i)).items():
                self.masks[prefix + name] = matrix, matrix.weight == 0

    def on_train_begin(self, training, state, control, **kwargs):
        if training.fsdp or training.deepspeed:
            raise InvalidInput(
                "FSDP and DeepSpeed shard weights, and zeros can only be kept in whole weights: train without them"
            )

    @torch.no_grad()
    def on_optimizer_step(self, *args, **kwargs):
        for matrix, mask in self.masks.values():
            matrix.weight.masked_fill_(mask, 0)

    @torch.no_grad()
    def keep_others(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Give surviving weights that would round to zero in the files the smallest number that the files' dtype can hold.

        `saved` is {tensor name: tensor in its file}.
        """
        for name, (matrix, mask) in self.masks.items():
            dtype = saved[name.removesuffix(matrix.name) + matrix.tensor_name].dtype
            info, weight = torch.finfo(dtype), matrix.weight
            lost = ~mask & (weight.to(dtype) == 0)
            weight.copy_(torch.where(lost, torch.copysign(torch.full_like(weight, info.tiny * info.eps), weight), weight))


def add_adapters(decoder: Decoder, keep: KeepZeros, rank: int) -> nn.Module:
    """The model with LoRA adapters (arXiv 2106.09685) on its blocks' linears, each masked as its weight is.

    Stacks of experts get no adapters. `merge_and_unload()` of the result adds the adapters to the weights.

    Raises:
        InvalidInput: peft is not installed.
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
    """Mask what an adapter adds to its linear's weight, both in training and in merging. `mask` has the stored shape."""
    linear, (adapter,) = layer.get_base_layer(), layer.active_adapters
    dense = layer.get_delta_weight

    def delta(name: str) -> torch.Tensor:
        return dense(name).masked_fill(mask, 0)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        return functional_call(linear, {"weight": linear.weight + delta(adapter)}, (inputs,))

    layer.get_delta_weight, layer.forward = delta, forward
