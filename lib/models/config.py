"""Reads a model's config.json, refuses models that cannot be pruned, and says what follows from the config."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    __version__,
)

from lib.errors import InvalidInput, Refusal
from lib.models.decoder import Decoder
from lib.models.host import is_out_of_memory

# quant_method of a checkpoint that was published in few bits -> how to turn it into one of 16 bits
DENSE = {
    "fp8": "dequantise it first (FineGrainedFP8Config(dequantize=True) of transformers, then save_pretrained)",
    "mxfp4": "dequantise it first (Mxfp4Config(dequantize=True) of transformers, then save_pretrained)",
}
LIBRARY = Path(__file__).resolve().parents[1]  # the code of this project
SAID = 200  # characters of another library's message that are passed on
TABLE_OFFSET = 2  # rows before the first position in the position tables of OPT and similar models
NEED_BOS = ("gemma",)  # part of the model_type of models that fail in a window that does not begin with BOS


def read_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """A model's config.

    Raises:
        InvalidInput: it is damaged, of an unknown type, in need of --trust_remote_code, or of a model that cannot be pruned.
    """
    remedy = "restore it, or download the model again"
    with reading(name, "its config.json", remedy):
        content, _ = PretrainedConfig.get_config_dict(name)
        if not isinstance(content, dict):
            raise InvalidInput(f"{name}: its config.json cannot be read (it holds a {type(content).__name__}): {remedy}")
        kind, code = content.get("model_type"), content.get("auto_map") or {}
    if kind not in CONFIG_MAPPING and not code:
        advice = f"which transformers {__version__} does not know: check the name, or find out which version knows it"
        raise InvalidInput(f"{name} has the model_type {kind!r} in its config.json, {advice}")
    if kind not in CONFIG_MAPPING and not trust_remote_code:
        raise InvalidInput(
            f"{name} runs code of its own ({kind}, auto_map in config.json): read it, then add --trust_remote_code"
        )
    with reading(name, "its config.json", remedy):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if quantisation := getattr(config, "quantization_config", None):
        method = quantisation.get("quant_method", "") if isinstance(quantisation, dict) else quantisation.quant_method
        method = str(getattr(method, "value", method))
        remedy = DENSE.get(method, "give the model it was made from")
        raise InvalidInput(f"{name} is quantised ({method}): only dense weights can be pruned, {remedy}")
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    causal = any(type(config) in mapping for mapping in mappings) or "AutoModelForCausalLM" in code
    if getattr(config, "is_encoder_decoder", False) or encoder or not causal:
        raise InvalidInput(f"{name} is of type {kind!r}, not a decoder that predicts the next token: only those can be pruned")
    return config


def auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The class that makes a model from a config: a language model, or its multimodal wrapper if transformers has no other."""
    wrapped = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if wrapped else AutoModelForCausalLM


def positions(decoder: Decoder) -> tuple[int | None, bool]:
    """How many positions a model was made for (None if unknown), and whether it has a table of positions that ends there."""
    count = getattr(decoder.model.config.get_text_config(), "max_position_embeddings", None)
    if count is None:
        return None, False
    tables = [*decoder.model.named_parameters(), *decoder.model.named_buffers()]
    learned = any(
        ("pos" in name or "wpe" in name) and tensor.ndim > 1 and count <= max(tensor.shape[:-1]) <= count + TABLE_OFFSET
        for name, tensor in tables
    )
    return count, learned


def needs_bos(decoder: Decoder) -> bool:
    """Whether a model was trained with BOS before every text and needs it, like Gemma 1 to 4 and models derived from them."""
    return any(family in decoder.model.config.model_type for family in NEED_BOS)


@contextmanager
def reading(name: str, what: str, remedy: str) -> Iterator[None]:
    """Inside the context, what libraries raise about a model's files, of many types and lines, becomes one line.

    Errors from this project's code and a lack of memory stay what they are.

    Raises:
        InvalidInput: instead of what the libraries raise.
    """
    try:
        yield
    except Exception as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if isinstance(error, Refusal) or is_out_of_memory(error) or LIBRARY in raised_in.parents:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:SAID]}"
        raise InvalidInput(f"{name}: {what} cannot be read ({reason}): {remedy}") from error
