"""Every type of model that transformers registers, by scripts/families.py: 25 in the fast tier, all in the slow one."""

import os

import families
import pytest
import torch
from conftest import free_port, prune_model, random_windows
from test_walk import ours
from tiny_configs import TYPES, tiny_model

from lib import parallel
from lib.models import checks, loading
from lib.models.decoder import Decoder
from lib.pruning.masks import Sparsity

CPU = torch.device("cpu")
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "granitemoe", "ernie4_5_moe", "zaya"]
HYBRIDS = ["qwen3_next", "qwen3_5", "jamba", "bamba", "falcon_h1", "nemotron_h", "mamba", "mamba2", "recurrent_gemma", "lfm2"]
OTHERS = ["gpt2", "gemma3", "gemma4_text", "mistral3", "modernbert-decoder", "mllama", "zamba2"]
NEEDED = {
    *MIXTURES, *HYBRIDS, *OTHERS, "qwen2_moe", "qwen3_5_moe", "deepseek_v2", "llama4_text", "glm4_moe", "olmoe", "granitemoehybrid",
    "phimoe", "falcon_mamba", "lfm3", "olmo_hybrid", "gemma3_text", "gemma3n_text", "gemma4",
}  # fmt: skip
UNUSUAL = [
    ("afmoe", {"num_shared_experts": 0}),  # linears of no outputs
    ("falcon_h1", {"num_hidden_layers": 1}),  # a tuple, and no next block to take it
]
THREE = ["qwen3_moe", "qwen3_next", "gemma3"]  # a mixture, a hybrid, a wrapper


@pytest.mark.parametrize("kind", MIXTURES + HYBRIDS + OTHERS)
def test_a_family_is_pruned_and_differentiated_right(kind):
    families.check(kind)


@pytest.mark.parametrize("kind, changes", UNUSUAL, ids=str)
def test_unusual_configs_too(kind, changes):
    families.check(kind, **changes)


@pytest.mark.slow
def test_every_type_works_or_is_refused_in_one_line():
    found = {kind: families.isolated(kind) for kind in [*TYPES, *sorted(NEEDED - set(TYPES))]}  # and some wrappers
    assert not {kind: answer for kind, answer in found.items() if answer[0] in ("wrong", "crashed")}
    works = {kind for kind, answer in found.items() if answer[0] == "works"}
    assert works >= NEEDED and len(works & set(TYPES)) >= 120


@pytest.mark.parametrize("kind", THREE)
def test_gradients_from_disk_are_bitwise_those_in_memory(kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path)
    windows = random_windows(3).cpu()
    resident, streamed = (families.load(tmp_path, streamed=streamed) for streamed in (False, True))
    kept, read = ours(resident, windows, keep_graph=True), ours(streamed, windows, keep_graph=False, group=2)
    assert all(torch.equal(kept[norm][name], read[norm][name]) for norm in kept for name in kept[norm])


def of_one_rank(rank, world, port, folder):
    """Gradients, then pruning, of this rank's share of five windows."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    parallel.start(CPU)
    torch.save({kind: outcome(kind) for kind in THREE}, f"{folder}/rank{rank}.pt")
    parallel.stop()


def outcome(kind: str) -> tuple[dict, dict]:
    windows = random_windows(5).cpu()
    norms = ours(Decoder(tiny_model(kind), CPU), parallel.share(windows))
    decoder = Decoder(tiny_model(kind), CPU)
    prune_model(decoder, windows, method="wanda", sparsity=Sparsity.parse("2:4"))
    return norms, decoder.model.state_dict()


def test_two_processes_agree_with_one(tmp_path):
    torch.multiprocessing.spawn(of_one_rank, (2, free_port(), str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for kind in THREE:
        norms, weights = outcome(kind)
        for norm, values in norms.items():
            found = one[kind][0][norm] | two[kind][0][norm]  # each block's are in one of the two
            assert found.keys() == values.keys()
            for name, value in values.items():
                assert (found[name] - value).norm() <= 1e-5 * value.norm()
        for _, pruned in (one[kind], two[kind]):
            differing = sum(((pruned[name] == 0) != (weights[name] == 0)).sum().item() for name in weights)
            assert differing < 1e-3 * sum(weight.numel() for weight in weights.values())
        assert all(torch.equal(one[kind][1][name], two[kind][1][name]) for name in weights)


def test_names_of_a_wrapper_are_under_its_language_model():
    decoder = Decoder(tiny_model("gemma3"), CPU)
    assert decoder.prefixes[0] == "model.language_model.layers.0."
    assert decoder.linears(0).keys() == Decoder(tiny_model("gemma3_text"), CPU).linears(0).keys()


@pytest.mark.parametrize(
    "kind, message",
    [
        ("xlm", "between block 0 and block 1 the model changes what it hands on"),
        ("bart", r"cannot be run one by one on text: their loss is"),
        ("cpmant", r"is given hidden states of \(1, 43, 32\) for 11 tokens"),
        ("dbrx", r"only \d+% of the weights in the blocks of DbrxForCausalLM"),
    ],
)
def test_what_cannot_run_block_by_block_is_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        Decoder(tiny_model(kind), CPU)


def test_what_stays_dense_is_named_with_its_share():
    decoder = Decoder(tiny_model("mamba"), CPU)
    shares = checks.dense_shares(decoder)
    assert set(shares) == {"mixer.A_log", "mixer.conv1d.weight"}
    weights = sum(parameter.numel() for parameter in decoder.blocks.parameters())
    a_log = sum(block.mixer.A_log.numel() for block in decoder.blocks)
    assert shares["mixer.A_log"] == pytest.approx(a_log / weights)


@pytest.mark.parametrize(
    "method, remedy", [("fp8", r"FineGrainedFP8Config\(dequantize=True\)"), ("mxfp4", r"Mxfp4Config\(dequantize=True\)")]
)
def test_checkpoints_in_few_bits_are_refused_by_name_with_the_remedy(method, remedy, tmp_path):
    config = tiny_model("llama").config
    config.quantization_config = {"quant_method": method}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"is quantised \({method}\): .*{remedy}"):
        loading.outline(str(tmp_path))
