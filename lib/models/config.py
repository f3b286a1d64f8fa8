"""A model's config.json: read, refused where its model cannot be pruned, and what it says of the model."""

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

# How a checkpoint that was published in few bits is had in 16, by its quant_method.
DENSE = {
    "fp8": "dequantise it first (FineGrainedFP8Config(dequantize=True) of transformers, then save_pretrained)",
    "mxfp4": "dequantise it first (Mxfp4Config(dequantize=True) of transformers, then save_pretrained)",
}
LIBRARY = Path(__file__).resolve().parents[1]  # our own code
SAID = 200  # characters of another library's message that are passed on
TABLE_OFFSET = 2  # rows before the first position in the tables of OPT and its like
NEED_BOS = ("gemma",)  # in a config's model_type: models that are lost in a window that does not begin with BOS


def read_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """A model's config.

    Raises:
        ValueError: damaged, of an unknown kind, in need of --trust_remote_code, or of a model this project cannot prune.
    """
    remedy = "restore it, or download the model again"
    with reading(name, "its config.json", remedy):
        said, _ = PretrainedConfig.get_config_dict(name)
        if not isinstance(said, dict):
            raise InvalidInput(f"{name}: its config.json cannot be read (it holds a {type(said).__name__}): {remedy}")
        kind, code = said.get("model_type"), said.get("auto_map") or {}
    if kind not in CONFIG_MAPPING and not code:
        known = f"which transformers {__version__} does not know: see which version does, or whether the name is right"
        raise InvalidInput(f"{name} has the model_type {kind!r} in its config.json, {known}")
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
        raise InvalidInput(f"{name} is a {kind}, not a decoder that predicts the next token: only those can be pruned")
    return config


def auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """What makes a model of a config: of a language model alone, or where transformers has none, in its multimodal wrapper."""
    wrapped = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if wrapped else AutoModelForCausalLM


def positions(decoder: Decoder) -> tuple[int | None, bool]:
    """How many positions a model was made for (None: it does not say), and whether it has a table that ends there."""
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
    """Whether a model's family was trained with BOS before every text, and needs it: Gemma 1 to 4 and what derives from them."""
    return any(family in decoder.model.config.model_type for family in NEED_BOS)


@contextmanager
def reading(name: str, what: str, remedy: str) -> Iterator[None]:
    """What libraries raise about a model's files, in a dozen types and many lines, as one refusal of one line.

    A defect of this project, and memory that does not suffice, stay what they are.
    """
    try:
        yield
    except Exception as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if isinstance(error, Refusal) or is_out_of_memory(error) or LIBRARY in raised_in.parents:
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:SAID]}"
        raise InvalidInput(f"{name}: {what} cannot be read ({said}): {remedy}") from error
