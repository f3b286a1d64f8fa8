"""Dtypes that weights are stored in and that cannot be computed with, whatever config.json says."""

import pytest
import torch
from conftest import DEVICE, tiny_model
from safetensors.torch import load_file, save_file

from lib.models import loading

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def stored_in(folder, dtype, named="proj"):
    tiny_model("llama", noise=0).cpu().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor.to(dtype) if named in name else tensor for name, tensor in weights.items()}
    return weights


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("dtype", [*FLOAT8, torch.int8, torch.uint8])
def test_quantised_weights_without_a_word_in_the_config(dtype, streamed, tmp_path):
    save_file(stored_in(tmp_path, dtype), tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = (
        r"proj\.weight in .* is stored in (F8_E\dM\d|I8|U8): a quantised model cannot be pruned, load the one it was made from"
    )
    with pytest.raises(ValueError, match=message):
        loading.load(str(tmp_path), device=DEVICE, streamed=streamed)


def test_quantised_weights_in_pytorch_files(tmp_path):
    torch.save(stored_in(tmp_path, torch.float8_e4m3fn), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"proj\.weight in .* is stored in torch\.float8_e4m3fn"):
        loading.load(str(tmp_path), device=DEVICE)


@pytest.mark.parametrize("streamed", [False, True])
def test_tensors_that_are_no_weights_may_have_any_dtype(streamed, tmp_path):
    extra = {"model.layers.0.mask": torch.ones(4, 4, dtype=torch.bool), "scales": torch.ones(4, 4, dtype=torch.int8)}
    weights = stored_in(tmp_path, torch.float64)
    save_file(weights | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert loading.load(str(tmp_path), dtype="float32", device=DEVICE, streamed=streamed).model.dtype == torch.float32
