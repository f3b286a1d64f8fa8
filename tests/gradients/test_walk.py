"""Block-by-block gradient norms against whole-model autograd."""

import functools

import pytest
import torch
from conftest import DEVICE, TINY, random_windows, tiny_decoder, tiny_model
from torch import nn

from lib.gradients import backward
from lib.gradients import sums as sums_module
from lib.gradients.sums import BlockSums
from lib.gradients.walk import gradient_norms
from lib.models import loading

SCALE = 100.0


def autograd_norms(model, linears, windows):
    """{linear: l1 and l2 norm} by one backward over the whole model a sample, in float64 sums."""
    model.requires_grad_(True)
    l1, l2 = {}, {}
    for window in windows:
        model.zero_grad()
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        for name in linears:
            g = model.get_submodule(name).weight.grad.double() * SCALE
            l1[name] = l1.get(name, 0) + g.abs()
            l2[name] = l2.get(name, 0) + g**2
    return {"l1": l1, "l2": {name: total.sqrt() for name, total in l2.items()}}


def ours(decoder, windows, **options):
    norms = {"l1": {}, "l2": {}}
    for i, sums in gradient_norms(decoder, windows, scale=SCALE, **options):
        for norm in norms:
            norms[norm] |= {decoder.prefixes[i] + name: value for name, value in sums.result(norm).items()}
    return norms


def largest_difference(a, b):
    return max(((a[norm][name] - b[norm][name]).norm() / b[norm][name].norm()).item() for norm in a for name in a[norm])


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("keep_graph", [True, False])
def test_norms_equal_whole_model_autograd(family, keep_graph):
    decoder, windows = tiny_decoder(family), random_windows()
    norms = ours(decoder, windows, keep_graph=keep_graph)
    expected = autograd_norms(tiny_model(family), norms["l1"], windows)
    assert len(norms["l2"]) == sum(len(decoder.linears(i)) for i in range(3))
    assert largest_difference(norms, expected) < 1e-5


def test_both_forms_and_every_grouping_agree_bitwise():
    windows = random_windows(5)
    kept = ours(tiny_decoder(), windows, keep_graph=True)
    for group in (None, 1, 2, 5):
        recomputed = ours(tiny_decoder(), windows, keep_graph=False, group=group)
        assert all(torch.equal(kept[norm][name], recomputed[norm][name]) for norm in kept for name in kept[norm])


def test_absolute_values_are_taken_per_sample():
    sums = BlockSums(("l1", "l2"), SCALE)
    for g in ([[3.0, -1.0]], [[-4.0, 1.0]]):
        sums.add("q", torch.tensor(g))
    assert sums.result("l1")["q"].tolist() == [[700.0, 200.0]]  # not 100 and 0, not divided by n
    assert sums.result("l2")["q"][0, 0].item() == 500.0


def test_transposed_gradients_and_loss_scales():
    plain, other = BlockSums(("l1", "l2"), SCALE), BlockSums(("l1", "l2"), SCALE)
    for k in range(3):
        g = torch.randn(4, 6, generator=torch.Generator().manual_seed(k))
        plain.add("q", g.clone())
        other.add("q", g.T.contiguous().T * 8 if k % 2 else g.clone(), loss_scale=8.0 if k % 2 else 1.0)
    for norm in ("l1", "l2"):
        a, b = plain.result(norm)["q"], other.result(norm)["q"]
        assert torch.equal(a, b)


def test_large_gradients_are_added_in_parts(monkeypatch):
    g = torch.randn(7, 11)
    monkeypatch.setattr(sums_module, "CACHE_ELEMENTS", 10)
    sums = BlockSums(("l1",), 1.0)
    sums.add("q", g.clone())
    assert torch.equal(sums.result("l1")["q"], g.abs())


def test_only_the_blocks_linears_get_gradients():
    decoder = tiny_decoder("llama")
    list(gradient_norms(decoder, random_windows(1)))
    asking = {name for name, parameter in decoder.model.named_parameters() if parameter.requires_grad}
    assert asking == {f"{decoder.prefixes[i]}{name}.weight" for i in range(3) for name in decoder.linears(i)}
    assert all(parameter.grad is None for parameter in decoder.model.parameters())


def test_float16_gradients_do_not_vanish():
    """A small loss gradient underflows in float16 unless the loss is scaled before backward."""
    windows, small = random_windows(2), {"logits_scaling": 1e6}
    exact, half = (ours(tiny_decoder("granite", dtype, **small), windows) for dtype in (torch.float32, torch.float16))
    assert largest_difference(half, exact) < 0.02
    vanished = autograd_norms(tiny_model("granite", torch.float16, **small), half["l2"], windows)["l2"]
    name = "model.layers.0.self_attn.q_proj"
    assert (vanished[name] == 0).float().mean() > 0.9
    assert (half["l2"][name] == 0).float().mean() < 0.01


def test_float16_overflow_lowers_the_scale(monkeypatch):
    exact = ours(tiny_decoder("llama"), random_windows(2))
    monkeypatch.setattr(backward, "LOSS_SCALE", 2.0**30)  # overflows in the tail
    monkeypatch.setattr(backward, "BORDER_MAGNITUDE", 2.0**15)  # overflows inside the blocks
    lower, lowered = backward.Groups._lower, []

    def count(walk, loss_scale, sample, where):
        lowered.append(where)
        return lower(walk, loss_scale, sample, where)

    monkeypatch.setattr(backward.Groups, "_lower", count)
    half = ours(tiny_decoder("llama", torch.float16), random_windows(2))
    assert {"the LM head", "block 1"} <= set(lowered)  # block 2 gets what left the head finite
    assert largest_difference(half, exact) < 0.02


def test_bfloat16_gradients_are_those_of_float32_to_its_precision():
    exact, coarse = (ours(tiny_decoder("llama", dtype), random_windows(2)) for dtype in (torch.float32, torch.bfloat16))
    assert largest_difference(coarse, exact) < 0.1


def test_a_linear_without_gradients_is_named_when_streamed(tmp_path, caplog):
    model = tiny_model("llama").cpu()
    model.save_pretrained(tmp_path)
    decoder = loading.load(str(tmp_path), dtype="float32", device=DEVICE, streamed=True)
    decoder.blocks[1].mlp.forward = lambda hidden: hidden
    ours(decoder, random_windows(2), keep_graph=False)
    assert "3 matrices got no gradient from any sample" in caplog.text and "model.layers.1.mlp.gate_proj" in caplog.text


def test_samples_are_numbered_over_all_processes():
    decoder, windows = tiny_decoder("llama"), random_windows(3)
    windows[:, :] = 5
    windows[2] = 7
    with torch.no_grad():
        decoder.model.model.embed_tokens.weight[7] = torch.inf
    with pytest.raises(ValueError, match="sample 12 has a loss of nan"):
        list(gradient_norms(decoder, windows, first=10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_non_finite_sample_is_named(dtype):
    decoder = tiny_decoder("llama", dtype)
    windows = random_windows(3)
    windows[:, :] = 5
    windows[2] = 7
    with torch.no_grad():
        decoder.model.model.embed_tokens.weight[7] = torch.inf
    with pytest.raises(ValueError, match="sample 2 has a loss of nan.*--dtype"):
        list(gradient_norms(decoder, windows))


class Poisoned(torch.autograd.Function):
    """Identity whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("keep_graph", [True, False])
def test_a_gradient_that_stays_non_finite_names_sample_and_block(dtype, keep_graph):
    decoder = tiny_decoder("llama", dtype)
    decoder.blocks[1].mlp.register_forward_hook(lambda module, args, output: Poisoned.apply(output))
    with pytest.raises(ValueError, match="sample 0 gives a non-finite gradient in block 1"):
        list(gradient_norms(decoder, random_windows(2), keep_graph=keep_graph))


class Skipping(nn.Module):
    """A linear that only takes part when the hidden state is one it likes."""

    def __init__(self, linear, every):
        super().__init__()
        self.linear, self.every, self.calls = linear, every, 0
        self.in_features, self.weight = linear.in_features, linear.weight

    def forward(self, x):
        self.calls += 1
        return (
            self.linear(x)
            if self.every and self.calls % self.every == 0
            else x.new_zeros(*x.shape[:-1], self.linear.out_features)
        )


def test_linears_without_gradients_are_counted(caplog):
    decoder = tiny_decoder("llama")
    decoder.blocks[1].mlp.up_proj = Skipping(decoder.blocks[1].mlp.up_proj, every=2)
    norms = ours(decoder, random_windows(4))
    assert "model.layers.1.mlp.up_proj.linear got no gradient from 2 of 4 samples" in caplog.text
    assert norms["l2"]["model.layers.1.mlp.up_proj.linear"].any()
    decoder.blocks[1].mlp.up_proj.every = 0
    norms = ours(decoder, random_windows(4))
    assert (
        "1 matrices got no gradient from any sample and stay dense where a method needs gradients: model.layers.1."
        in caplog.text
    )
    assert not norms["l2"]["model.layers.1.mlp.up_proj.linear"].any()


@pytest.mark.parametrize("skipped", [0, 1, 2])
@pytest.mark.parametrize("keep_graph", [True, False])
def test_a_block_that_some_samples_skip(skipped, keep_graph, caplog):
    decoder, windows = tiny_decoder("llama"), random_windows(4)
    states = decoder.enter_all(windows)
    for i in range(skipped):
        decoder.advance(i, states)
    entering = torch.stack([state.hidden[0, 0, 0] for state in states])
    limit = [entering.sort().values[1]]
    plain = type(decoder.blocks[skipped])

    class Skipping(plain):
        @functools.wraps(plain.forward)
        def forward(self, hidden_states, *args, **kwargs):
            skip = hidden_states[0, 0, 0] <= limit[0]
            return hidden_states if skip else super().forward(hidden_states, *args, **kwargs)

    decoder.blocks[skipped].__class__ = Skipping
    norms = ours(decoder, windows, keep_graph=keep_graph)
    others = ours(tiny_decoder("llama"), windows[entering > limit[0]], keep_graph=keep_graph)
    for name in decoder.linears(skipped):
        full = f"model.layers.{skipped}.{name}"
        assert f"{full} got no gradient from 2 of 4 samples" in caplog.text
        assert torch.equal(norms["l2"][full], others["l2"][full])  # the samples that skip the block add nothing
    limit[0] = torch.inf
    ours(decoder, windows, keep_graph=keep_graph)
    assert (
        f"7 matrices got no gradient from any sample and stay dense where a method needs gradients: model.layers.{skipped}."
        in caplog.text
    )
