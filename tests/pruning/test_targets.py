"""Which linears are pruned, and how much of each."""

import json

import pytest
from conftest import tiny_decoder

from lib.pruning.masks import Sparsity
from lib.pruning.targets import read_ratios, select, total_ratio

HALF = Sparsity(0.5)


@pytest.fixture(scope="module")
def decoder():
    return tiny_decoder()


def names(targets):
    return {f"{i}.{name}" for i, linears in targets.items() for name in linears}


def test_everything_by_default(decoder):
    assert names(select(decoder, HALF)) == {f"{i}.{name}" for i in range(3) for name in decoder.linears(i)}


def test_patterns_match_full_names(decoder):
    assert names(select(decoder, HALF, include=["*.o_proj", "model.layers.1.mlp.*"])) == {
        "0.self_attn.o_proj", "1.self_attn.o_proj", "2.self_attn.o_proj", "1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj",
    }  # fmt: skip
    kept = select(decoder, HALF, include=["*.self_attn.*"], exclude=["*.o_proj", "*.v_proj"], layer=2)
    assert names(kept) == {"2.self_attn.q_proj", "2.self_attn.k_proj"}


def test_the_last_ratio_that_matches_counts(decoder):
    ratios = {"0": 0.1, "*.mlp.*": 0.2, "*.layers.2.mlp.up_proj": 0.0, "1": 0.3}
    targets = select(decoder, HALF, ratios=ratios)
    assert targets[0]["self_attn.q_proj"].ratio == 0.1 and targets[0]["mlp.up_proj"].ratio == 0.2
    assert targets[1]["mlp.up_proj"].ratio == 0.3
    assert targets[2]["self_attn.q_proj"].ratio == 0.5 and targets[2]["mlp.gate_proj"].ratio == 0.2
    assert "mlp.up_proj" not in targets[2]  # 0: stays as it is


def test_ratios_of_what_is_not_selected_do_not_matter(decoder):
    assert names(select(decoder, HALF, ratios={"0": 0.5, "*.o_proj": 0.1}, layer=1, exclude=["*.o_proj"])) == {
        f"1.{name}" for name in decoder.linears(1) if name != "self_attn.o_proj"
    }


def test_the_total_counts_what_stays_dense(decoder):
    targets = select(decoder, HALF, include=["*.up_proj"], layer=0)
    weights = sum(linear.weight.numel() for i in range(3) for linear in decoder.linears(i).values())
    assert total_ratio(decoder, targets) == 0.5 * decoder.linears(0)["mlp.up_proj"].weight.numel() / weights
    assert total_ratio(decoder, select(decoder, Sparsity.parse("1:4"))) == 0.25


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layer": 3}, "--layer_no 3 does not exist: the model has blocks 0 to 2"),
        ({"include": ["*.fc1"]}, r"--include '\*\.fc1' matches none of the 21 linears.*model\.layers\.0\.self_attn\.q_proj"),
        ({"exclude": ["o_proj"]}, "--exclude 'o_proj' matches none"),
        ({"exclude": ["*"]}, "nothing is selected"),
        ({"include": ["*.layers.0.*"], "layer": 1}, "nothing is selected"),
        ({"ratios": {"3": 0.5}}, "block 3 of --layer_ratios does not exist: the model has blocks 0 to 2"),
        ({"ratios": {"*.fc1": 0.5}}, "--layer_ratios '\\*\\.fc1' matches none"),
        ({"ratios": {"0": 0.5}, "sparsity": None}, r"model\.layers\.1\..* has no ratio: add --sparsity_ratio"),
        ({"sparsity": Sparsity.parse("2:5")}, "32 inputs, not divisible by 5"),
    ],
)
def test_what_selects_nothing_is_an_error(decoder, options, message):
    with pytest.raises(ValueError, match=message):
        select(decoder, options.pop("sparsity", HALF), **options)


def test_ratios_for_everything_need_no_other(decoder):
    assert select(decoder, None, ratios={"*": 0.25})[2]["mlp.up_proj"].ratio == 0.25


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON"),
        ("[0.5]", "not a JSON object"),
        ("{}", "not a JSON object"),
        (json.dumps({"0": 1.0}), r"'0' the ratio 1\.0: it must be a number in \[0, 1\)"),
        (json.dumps({"0": "half"}), "'half'"),
        (json.dumps({"0": True}), "True"),
        (json.dumps({"0": -0.1}), "-0"),
    ],
)
def test_a_ratio_file_that_is_none(tmp_path, text, message):
    (tmp_path / "ratios.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_ratios(tmp_path / "ratios.json")
