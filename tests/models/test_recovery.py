"""Training keeps the zeros: full, and by adapters that are masked as the weights are."""

import importlib.util

import pytest
import torch
from conftest import DEVICE, prune_model, random_windows, tiny_decoder
from transformers import Trainer, TrainingArguments

from lib.models.recovery import KeepZeros, add_adapters
from lib.pruning.masks import Sparsity

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="no peft: pip install -r requirements-finetune.txt"
)
PATTERNS = ["2:4", "unstructured"]


def pruned(pattern: str, family: str = "llama-gqa-tied"):
    decoder = tiny_decoder(family)
    prune_model(decoder, random_windows(4), method="wanda", sparsity=Sparsity.parse(pattern, 0.5))
    return decoder


def zeros(decoder) -> dict[str, torch.Tensor]:
    return {f"{i}.{name}": linear.weight == 0 for i in range(len(decoder)) for name, linear in decoder.linears(i).items()}


def train(model, folder, callbacks=(), rate=0.05, **more) -> None:
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, learning_rate=rate, use_cpu=DEVICE.type == "cpu", report_to=[],
        save_strategy="no", disable_tqdm=True, seed=0, **more,
    )  # fmt: skip
    samples = [{"input_ids": window, "labels": window} for window in random_windows(8).cpu()]
    Trainer(model, arguments, train_dataset=samples, callbacks=list(callbacks)).train()


def same(before: dict, after: dict) -> bool:
    return all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2, "weight_decay": 0.1, "optim": "sgd"}])
def test_full_training_keeps_the_zeros(pattern, more, tmp_path):
    decoder = pruned(pattern)
    before, weight = zeros(decoder), decoder.linears(1)["mlp.up_proj"].weight.clone()
    train(decoder.model.requires_grad_(True), tmp_path, [KeepZeros(decoder)], **more)
    assert same(before, zeros(decoder))
    assert not torch.equal(weight, decoder.linears(1)["mlp.up_proj"].weight)


def test_without_the_callback_they_are_lost(tmp_path):
    decoder = pruned("2:4")
    before = zeros(decoder)
    train(decoder.model.requires_grad_(True), tmp_path)
    assert not same(before, zeros(decoder))


@needs_peft
@pytest.mark.parametrize("pattern", PATTERNS)
def test_merged_adapters_keep_the_zeros_and_the_outputs(pattern, tmp_path):
    decoder, windows = pruned(pattern), random_windows(2, seed=5)
    before, keep = zeros(decoder), KeepZeros(decoder)
    model = add_adapters(decoder, keep, rank=4)
    train(model, tmp_path, [keep])
    model.eval()
    with torch.no_grad():
        trained = model(windows).logits
        model.merge_and_unload()
        merged = decoder.model(windows).logits
    assert same(before, zeros(decoder))
    assert torch.allclose(trained, merged, atol=1e-5)  # what was trained is what is saved
    with torch.no_grad():
        untrained = pruned(pattern).model(windows).logits
    assert not torch.allclose(merged, untrained, atol=1e-2)


@needs_peft
def test_adapters_alone_lose_the_zeros_when_they_are_merged(tmp_path):
    """The trap: masking a merged model afterwards would give another model than the one that was trained."""
    from peft import LoraConfig, get_peft_model

    decoder, windows = pruned("2:4"), random_windows(2, seed=5)
    before, keep = zeros(decoder), KeepZeros(decoder)
    names = [prefix + name for i, prefix in enumerate(decoder.prefixes) for name in decoder.linears(i)]
    model = get_peft_model(decoder.model, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    train(model, tmp_path)
    model.eval()
    with torch.no_grad():
        trained = model(windows).logits
        model.merge_and_unload()
        assert not same(before, zeros(decoder))
        keep.on_optimizer_step()
        assert same(before, zeros(decoder)) and not torch.allclose(decoder.model(windows).logits, trained, atol=1e-2)


@needs_peft
def test_linears_that_are_not_pruned_have_adapters_too(tmp_path):
    decoder = pruned("2:4")
    dense = decoder.linears(0)["self_attn.o_proj"].weight
    dense.copy_(torch.randn_like(dense))
    kept = dense.clone()
    keep = KeepZeros(decoder)
    model = add_adapters(decoder, keep, rank=2)
    train(model, tmp_path, [keep])
    model.merge_and_unload()
    assert not torch.equal(kept, dense)


def test_without_peft_the_remedy_is_said(monkeypatch):
    decoder = pruned("2:4")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match="pip install -r requirements-finetune.txt"):
        add_adapters(decoder, KeepZeros(decoder), rank=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_survivors_that_the_files_dtype_would_round_to_zero_stay(dtype):
    decoder = pruned("2:4")
    keep = KeepZeros(decoder)
    matrix, mask = keep.masks["model.layers.0.mlp.up_proj"]
    row, column = (~mask).nonzero()[0]
    other = (~mask).nonzero()[1]
    matrix.weight[row, column] = -1e-42 if dtype != torch.float16 else -1e-9
    matrix.weight[other[0], other[1]] = 0.0
    keep.keep_others({name: torch.empty(0, dtype=dtype) for name in decoder.model.state_dict()})
    saved = matrix.weight.to(dtype)
    assert torch.equal(saved == 0, mask)
    assert saved[row, column] < 0 and saved[row, column].abs() < 1e-7


def test_sharded_training_is_refused(tmp_path):
    decoder = pruned("2:4")
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    arguments.fsdp = ["full_shard"]
    with pytest.raises(ValueError, match="FSDP"):
        KeepZeros(decoder).on_train_begin(arguments, None, None)
