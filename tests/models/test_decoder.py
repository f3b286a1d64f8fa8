"""Head - blocks - tail against the model's own forward, for every family."""

import pytest
import torch
import transformers
from conftest import SMALL, TINY, random_windows, tiny_decoder, tiny_model

from lib.models import decoder as decoder_module
from lib.models import fingerprint, loading
from lib.models.decoder import Decoder


def walk(decoder, tokens):
    state = decoder.enter(tokens)
    for i in range(len(decoder)):
        with decoder.resident(i):
            decoder.advance(i, [state])
    return state.hidden


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("batch, blocks", [(1, 3), (3, 3), (1, 6)])
def test_the_walk_is_the_models_forward(family, batch, blocks, monkeypatch):
    monkeypatch.setattr(decoder_module, "TAIL_POSITIONS", {"cpu": 5, "gpu": 5})  # 12 tokens: spans of 5, 5 and 1 targets
    deep = {"num_hidden_layers": blocks} | (
        {"no_rope_layers": [1, 0] * (blocks // 2)} if (family, blocks) == ("smollm3", 6) else {}
    )
    decoder, tokens = tiny_decoder(family, **deep), random_windows(batch)
    decoder.enter(random_windows(2, 7, seed=5))  # arguments of another shape must not be reused
    loss, _ = decoder.tail(walk(decoder, tokens), tokens)
    expected = tiny_model(family, **deep)(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("family", TINY)
def test_linears_are_those_of_the_blocks(family):
    decoder = tiny_decoder(family)
    own = {f"{decoder.prefixes[i]}{name}" for i in range(len(decoder)) for name in decoder.linears(i)}
    everywhere = {name for name, module in decoder.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(decoder) == 3
    assert own == {name for name in everywhere if name.startswith(decoder.prefixes[0].rpartition("0.")[0])}
    assert own and not any("head" in name or "embed_out" in name for name in own)


def test_the_head_shares_equal_arguments_between_samples():
    decoder = tiny_decoder("gemma2")
    first, second = (decoder.enter(window[None]) for window in random_windows(2))
    assert first.kwargs is second.kwargs
    assert first.kwargs[0]["attention_mask"] is not first.kwargs[1]["attention_mask"]  # windows alternate
    assert not any(isinstance(value, transformers.Cache) for kwargs in first.kwargs for value in kwargs.values())


def test_blocks_get_their_forward_back_after_an_error():
    decoder = tiny_decoder()
    with pytest.raises(RuntimeError):
        decoder.enter(torch.ones(1, 3))  # no token ids; ids beyond the vocabulary would end a GPU's context for good
    assert not any("forward" in vars(block) for block in decoder.blocks)


def test_a_model_with_little_to_prune_is_refused_by_name():
    model = tiny_model("llama")
    model.model.layers[1].large = torch.nn.Conv2d(64, 64, 5)
    with pytest.raises(ValueError, match=r"only \d+% of the weights .*layers\.1\.large\.weight \(64, 64, 5, 5\)"):
        Decoder(model, torch.device("cpu"))


def test_quantised_weights_are_refused_by_name():
    quantised = tiny_model("llama")
    linear = quantised.model.layers[1].mlp.up_proj
    linear.weight = torch.nn.Parameter(torch.zeros(linear.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is stored in torch\.int8: .* load the one it was"):
        Decoder(quantised, torch.device("cpu"))


def test_a_quantised_checkpoint_is_refused_by_its_config(tmp_path):
    config = transformers.LlamaConfig(**SMALL, quantization_config={"quant_method": "gptq", "bits": 4})
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is quantised \(gptq\): .* give the model it was made from"):
        loading.outline(str(tmp_path))


def test_the_fingerprint_knows_the_model_and_not_the_dtype():
    exact, rounded = fingerprint.of_block(tiny_decoder(), 1), fingerprint.of_block(tiny_decoder(dtype=torch.bfloat16), 1)
    assert exact.keys() == tiny_decoder().linears(1).keys()
    for name, values in exact.items():
        assert values.shape == (fingerprint.VALUES,)
        assert torch.allclose(values, rounded[name], rtol=2**-8, atol=0)


def test_dtype_auto(monkeypatch):
    config = transformers.LlamaConfig(dtype="float16")
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert loading.resolve_dtype("auto", config, cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert loading.resolve_dtype("auto", config, cpu) == torch.float32
    assert loading.resolve_dtype("auto", config, torch.device("cuda")) == torch.float16
    assert loading.resolve_dtype("bfloat16", config, cpu) == torch.bfloat16


def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="--device cpu"):
        loading.resolve_device("cuda:99")
