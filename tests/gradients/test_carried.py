"""Tensors that blocks leave for later ones (keys and values of Gemma 3n and 4) are part of the gradient."""

import pytest
import torch
from conftest import DEVICE, SMALL, prune_model, random_windows
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, Gemma4TextConfig

from lib.evaluation.perplexity import perplexity
from lib.gradients.walk import gradient_norms
from lib.models import loading
from lib.models.decoder import Decoder
from lib.pruning.masks import Sparsity

KINDS = ["sliding_attention", "full_attention"]
CONFIGS = {
    "gemma3n": lambda: Gemma3nTextConfig(
        **SMALL | {"num_hidden_layers": 6, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 5}, layer_types=KINDS * 3,
        num_kv_shared_layers=3, vocab_size_per_layer_input=96, hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=4,
        activation_sparsity_pattern=[0.0] * 6,
    ),
    "gemma4": lambda: Gemma4TextConfig(
        **SMALL | {"num_hidden_layers": 6, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 5}, layer_types=KINDS * 3,
        num_kv_shared_layers=3, vocab_size_per_layer_input=96, hidden_size_per_layer_input=8, global_head_dim=8,
    ),
}  # fmt: skip


def model_of(kind: str, dtype=torch.float32):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            parameter.data += 0.2 * torch.randn_like(parameter)  # Gemma 3n would begin without its per-layer inputs
    return model.to(DEVICE, dtype).eval()


def decoder_of(kind: str, dtype=torch.float32) -> Decoder:
    return Decoder(model_of(kind, dtype), DEVICE)


@pytest.mark.parametrize("kind", CONFIGS)
def test_perplexity_over_more_positions_than_the_tail_takes_at_a_time(kind):
    windows, model = random_windows(2, 150), model_of(kind)
    with torch.no_grad():
        losses = [model(window[None], labels=window[None], use_cache=False).loss for window in windows]
    assert perplexity(decoder_of(kind), windows) == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-4)


def autograd_norms(decoder: Decoder, windows) -> dict[str, torch.Tensor]:
    """l2 norms by whole-model autograd."""
    matrices = {decoder.prefixes[i] + n: m.module for i in range(len(decoder)) for n, m in decoder.linears(i).items()}
    decoder.model.requires_grad_(True)
    totals = {}
    for window in windows:
        decoder.model.zero_grad()
        decoder.model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        for name, module in matrices.items():
            if module.weight.grad is not None:
                totals[name] = totals.get(name, 0) + (100 * module.weight.grad.double()).square()
    decoder.model.zero_grad(set_to_none=True)
    decoder.model.requires_grad_(False)
    return {name: total.sqrt().float() for name, total in totals.items()}


def ours(decoder: Decoder, windows, **options) -> dict[str, torch.Tensor]:
    norms = {}
    for i, sums in gradient_norms(decoder, windows, norms=("l2",), **options):
        norms |= {decoder.prefixes[i] + name: value for name, value in sums.result("l2").items()}
    return norms


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("options", [{"keep_graph": True}, {"keep_graph": False}, {"keep_graph": False, "group": 2}])
def test_gradients_are_those_of_the_whole_model(kind, options):
    windows = random_windows(3)
    expected, found = autograd_norms(decoder_of(kind), windows), ours(decoder_of(kind), windows, **options)
    assert expected.keys() <= found.keys()
    for name, norm in expected.items():
        assert (found[name] - norm).norm() <= 1e-4 * norm.norm(), name


def test_they_are_not_without_what_is_carried(monkeypatch):
    """So that the test before can fail: the gradient through shared keys and values is a large part."""
    windows = random_windows(3)
    expected = autograd_norms(decoder_of("gemma4"), windows)
    monkeypatch.setattr("lib.models.block_arguments.left", lambda lent, leaves: {})
    found = ours(decoder_of("gemma4"), windows)
    assert max(((found[name] - norm).norm() / norm.norm()).item() for name, norm in expected.items()) > 0.05


@pytest.mark.parametrize("kind", CONFIGS)
def test_float16_scales_the_loss_of_them_too(kind):
    windows = random_windows(2)
    exact, half = ours(decoder_of(kind), windows), ours(decoder_of(kind, torch.float16), windows)
    worst = max(((half[name] - norm).norm() / norm.norm()).item() for name, norm in exact.items() if norm.any())
    assert worst < 0.2  # kernels differ in how they round attention (0.04 to 0.09); a factor of two left in would be 1


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_sample_has_its_own(kind):
    """Samples that go through the blocks together see their own keys and values."""
    windows = random_windows(3)
    together, alone = decoder_of(kind), decoder_of(kind)
    assert perplexity(together, windows, group=3) == pytest.approx(perplexity(alone, windows, group=1), rel=1e-6)
    loss = torch.stack([alone.model(input_ids=w[None], labels=w[None], use_cache=False).loss for w in windows]).mean()
    assert perplexity(together, windows, group=3) == pytest.approx(loss.exp().item(), rel=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_streamed_is_resident(kind, tmp_path):
    model_of(kind).cpu().save_pretrained(tmp_path)
    windows, found = random_windows(3), []
    for streamed in (False, True):
        decoder = loading.load(str(tmp_path), dtype="float32", device=DEVICE, streamed=streamed)
        norms = ours(decoder, windows, keep_graph=not streamed, group=2)
        zeros = {}

        def keep(i, block, decoder=decoder, zeros=zeros):
            zeros.update({(i, name): linear.weight == 0 for name, linear in decoder.linears(i).items()})

        prune_model(decoder, windows, method="wanda", sparsity=Sparsity.parse("2:4"), finished=keep)
        found.append((norms, zeros))
    assert all(torch.equal(found[0][k][name], found[1][k][name]) for k in (0, 1) for name in found[0][k])
