"""scripts/speed_2_4.py where there is no kernel: bytes, by hand."""

import pytest
import speed_2_4
import torch
from conftest import prune_model, random_windows, tiny_decoder, tiny_model

from lib.pruning.masks import Sparsity


@pytest.fixture
def folders(tmp_path):
    tiny_model(dtype=torch.float16).cpu().save_pretrained(tmp_path / "dense")
    decoder = tiny_decoder(dtype=torch.float16)
    prune_model(decoder, random_windows(4), method="wanda", sparsity=Sparsity.parse("2:4"))
    decoder.model.cpu().save_pretrained(tmp_path / "pruned")
    return tmp_path / "dense", tmp_path / "pruned"


def test_bytes(folders):
    dense, pruned = (speed_2_4.sizes(str(folder)) for folder in folders)
    decoder = tiny_decoder()
    weights = sum(linear.weight.numel() for i in range(len(decoder)) for linear in decoder.linears(i).values())
    plain = (folders[1] / "model.safetensors").stat().st_size
    assert pruned["plain"] == plain and abs(dense["plain"] - plain) < 100
    assert (
        pruned["packed"] == plain - weights * 2 + weights // 2 * 2 + weights // 8
    )  # half of the values, a bit for each weight
    assert dense["packed"] == dense["plain"]  # packing would make it larger
    zipped = next(key for key in pruned if key.startswith("zipped"))
    assert pruned["packed"] * 0.8 < pruned[zipped] < dense[zipped] <= dense["plain"]


def test_it_says_why_there_are_no_times(folders, capsys):
    dense, pruned = folders
    speed_2_4.main(speed_2_4.parse([str(pruned), "--against", str(dense), "--device", "cpu"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "times are left out: 2:4 kernels are for NVIDIA GPUs, and this is a CPU"
    assert lines[1].startswith(f"{dense}: plain") and lines[2].startswith(f"{pruned}: plain") and "packed" in lines[2]


def test_without_zstandard_zlib_does_it(monkeypatch):
    for name in ("zstandard", "compression"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    kind, compressor = speed_2_4.best_compressor()
    packer = compressor()
    assert kind == "zlib" and 0 < len(packer.compress(bytes(10000)) + packer.flush()) < 100


@pytest.mark.parametrize("zeros, expected", [([0, 1], True), ([2, 3], True), ([0, 1, 2], True), ([1], False)])
def test_is_2_4(zeros, expected):
    weight = torch.ones(2, 8)
    weight[:, :4] = 0
    weight[1, 4:][zeros] = weight[0, 4:][[0, 3]] = 0
    assert speed_2_4.is_2_4(weight) == expected


def test_widths_that_four_does_not_divide_are_not_2_4():
    assert not speed_2_4.is_2_4(torch.zeros(2, 6))


@pytest.mark.parametrize("arguments", ["nowhere/at/all", "x --device cuda:77", "x --tokens 0", "x --against a/b/c"])
def test_wrong_flags_are_parser_errors(arguments):
    with pytest.raises(SystemExit) as stop:
        speed_2_4.parse(arguments.split())
    assert stop.value.code == 2
