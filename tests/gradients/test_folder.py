"""The gradient folder: round trip, and every way in which it can be wrong."""

import json

import pytest
import torch
from conftest import tiny_decoder

from lib.gradients.folder import GradientNorms, GradientWriter, folder_of, key_of
from lib.models import fingerprint


def norms_of(decoder, i):
    generator = torch.Generator().manual_seed(i)
    return {name: torch.rand(shape, generator=generator) for name, shape in decoder.shapes(i).items()}


def check(path, decoder):
    GradientNorms(path).check(decoder)


@pytest.fixture
def decoder():
    return tiny_decoder()


@pytest.fixture
def folder(tmp_path, decoder):
    writer = GradientWriter(folder_of(str(tmp_path), 2, "l2", "hub/tiny-llama/"))
    for i in reversed(range(3)):
        writer.write_block(i, norms_of(decoder, i), fingerprint.of_block(decoder, i))
    writer.finish({"norm": "l2", "scale": 100.0, "model": "hub/tiny-llama"})
    return writer.folder


def test_published_names(folder, tmp_path):
    assert folder == tmp_path / "llama2" / "gradients_aggregrate_norm_l2_model_tiny-llama"
    assert key_of("self_attn.q_proj", 0) == "self_attn.q_proj_layer_0"
    index = json.loads((folder / "index.json").read_text())
    assert index["files"]["block_000.safetensors"]["tensors"]["self_attn.q_proj_layer_0"] == [32, 32]


def test_round_trip(folder, decoder):
    check(folder, decoder)
    norms = GradientNorms(folder).block(1)
    for name, expected in norms_of(decoder, 1).items():
        assert norms[name].dtype == torch.float16
        assert torch.equal(norms[name], expected.half())


def test_another_dtype_of_the_same_model_is_the_same_model(folder):
    check(folder, tiny_decoder(dtype=torch.bfloat16))
    check(folder, tiny_decoder(dtype=torch.float16))


def test_another_model_of_the_same_shape_is_refused(folder, decoder):
    with torch.no_grad():
        decoder.blocks[1].self_attn.k_proj.weight *= 1.02
    with pytest.raises(ValueError, match="k_proj_layer_1 .* was computed for other weights"):
        check(folder, decoder)


def test_more_or_fewer_blocks(folder):
    with pytest.raises(ValueError, match="holds 3 blocks, the model has 2"):
        check(folder, tiny_decoder(num_hidden_layers=2))
    with pytest.raises(ValueError, match="holds 3 blocks, the model has 4"):
        check(folder, tiny_decoder(num_hidden_layers=4))


def test_a_folder_without_index_is_no_result(folder):
    (folder / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no index\.json.*gradient_computation\.py"):
        GradientNorms(folder)


def test_the_folder_above_is_pointed_down(folder):
    with pytest.raises(FileNotFoundError, match=f"did you mean {folder}"):
        GradientNorms(folder.parent)


def test_files_are_as_readable_as_others(folder):
    (folder / "other").touch()
    assert (folder / "block_000.safetensors").stat().st_mode == (folder / "other").stat().st_mode


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist.*gradient_computation\.py"):
        GradientNorms(tmp_path / "none")


def test_an_unfinished_folder_has_another_name(tmp_path, decoder):
    writer = GradientWriter(tmp_path / "g")
    writer.write_block(0, norms_of(decoder, 0), fingerprint.of_block(decoder, 0))
    assert not (tmp_path / "g").exists()


def test_a_flipped_bit_and_a_lost_file(folder, decoder):
    file = folder / "block_001.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"block_001.*q_proj_layer_1.*corrupted"):
        check(folder, decoder)
    file.unlink()
    with pytest.raises(ValueError, match=r"block_001.*is missing"):
        check(folder, decoder)


def spoilt(decoder, **changes):
    tensors = {key_of(name, i): norm.half() for i in range(3) for name, norm in norms_of(decoder, i).items()}
    return {key: value for key, value in (tensors | changes).items() if value is not None}


def test_published_pth(tmp_path, decoder):
    torch.save(spoilt(decoder), tmp_path / "g.pth")
    check(tmp_path / "g.pth", decoder)
    norms = GradientNorms(tmp_path / "g.pth")
    assert norms.scale == 100
    assert torch.equal(norms.block(2)["mlp.up_proj"], norms_of(decoder, 2)["mlp.up_proj"].half())


@pytest.mark.parametrize(
    "wrong, message",
    [
        (None, "has no tensor mlp.up_proj_layer_1"),
        (torch.zeros(3, 4), r"mlp.up_proj_layer_1 .* is \(3, 4\), the model's is \(48, 32\)"),
        (torch.full((48, 32), torch.nan), "mlp.up_proj_layer_1 .* NaN"),
        (torch.full((48, 32), torch.inf), "mlp.up_proj_layer_1 .* infinity"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, decoder, wrong, message):
    torch.save(spoilt(decoder, **{"mlp.up_proj_layer_1": wrong}), tmp_path / "g.pth")
    with pytest.raises(ValueError, match=message):
        check(tmp_path / "g.pth", decoder)


def test_something_else_is_refused(tmp_path):
    (tmp_path / "g.pth").write_text("not a tensor in sight")
    with pytest.raises(ValueError, match="neither a gradient folder nor"):
        GradientNorms(tmp_path / "g.pth")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_not_finite_is_not_stored(tmp_path, decoder, value, dtype):
    norms = norms_of(decoder, 1)
    norms["mlp.up_proj"][3, 4] = value
    with pytest.raises(ValueError, match=r"mlp\.up_proj_layer_1 holds NaN or infinity.*--scale"):
        GradientWriter(tmp_path / "g", dtype).write_block(1, norms, fingerprint.of_block(decoder, 1))


def test_what_float16_cannot_hold_is_counted(tmp_path, decoder):
    norms = norms_of(decoder, 0)
    norms["mlp.up_proj"][0, :3] = torch.tensor([1e9, 1e-12, 0.0])
    writer = GradientWriter(tmp_path / "g")
    writer.write_block(0, norms, fingerprint.of_block(decoder, 0))
    assert (writer.underflow, writer.overflow) == (1, 1)
    writer.finish({"scale": 100.0})
    assert GradientNorms(tmp_path / "g").block(0)["mlp.up_proj"][0, 0] == 65504
