"""A model's name to a `Decoder`: in memory, or its blocks left in the checkpoint; on which device and in which dtype."""

import json
import logging
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaTokenizer,
    PretrainedConfig,
)
from transformers.utils import cached_file

from lib.models.checkpoint import Checkpoint
from lib.models.conversion import ModelTensors
from lib.models.decoder import Decoder

logger = logging.getLogger(__name__)

LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}  # of LLaMA-1 and 2
# How a checkpoint that was published in few bits is had in 16, by its quant_method.
DENSE = {
    "fp8": "dequantise it first (FineGrainedFP8Config(dequantize=True) of transformers, then save_pretrained)",
    "mxfp4": "dequantise it first (Mxfp4Config(dequantize=True) of transformers, then save_pretrained)",
}
SAID = 200  # characters of another library's message that are passed on
NEED_BOS = ("gemma",)  # in a config's model_type: models that are lost in a window that does not begin with BOS
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name: str, *, dtype: str = "auto", device: str | torch.device = "auto", streamed: bool = False, cache_dir: str | None = None
) -> Decoder:
    """Load a local or hub model for inference and pruning.

    `dtype` "auto": the checkpoint's own on a GPU; on a CPU bfloat16 where it has bfloat16 matrix instructions, else
    float32. `streamed`: only embeddings, final norm and LM head are loaded, blocks stay in the checkpoint's files.

    Raises:
        ValueError: a model this project cannot prune (see `Decoder`); streamed, a checkpoint without a tensor of the model.
    """
    device = resolve_device(device)
    config = AutoConfig.from_pretrained(name, cache_dir=cache_dir)
    run_dtype = resolve_dtype(dtype, config, device)
    if not streamed:
        model = auto_class(config).from_pretrained(
            name, dtype=run_dtype, cache_dir=cache_dir, device_map={"": device} if device.type != "cpu" else None
        )
        return Decoder(model, device)

    decoder = on_disk(name, dtype=run_dtype, device=device, cache_dir=cache_dir)
    model, path = decoder.model, decoder.prefixes[0].removesuffix("0.")
    for key in saved_names(decoder):
        if not key.startswith(path):
            set_module_tensor_to_device(model, key, device, value=decoder.source[key].to(device, run_dtype, copy=True))
    model.tie_weights(recompute_mapping=False)  # as `on_disk` found them
    for key, buffer in model.named_buffers():
        if buffer.device.type != "meta":
            set_module_tensor_to_device(model, key, device, value=buffer)
    decoder.require_runs_alone()
    return decoder


def check_name(name: str) -> None:
    """Raise FileNotFoundError if `name` can only be a folder, not a name on the hub (OWNER/NAME), and is none."""
    if (name.count("/") > 1 or name.startswith((".", "/", "~"))) and not Path(name).is_dir():
        raise FileNotFoundError(f"{name} is not a folder, and cannot be a model on the hub: those are called OWNER/NAME")


def outline(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    cache_dir: str | None = None,
) -> Decoder:
    """A model with its parameters on the meta device: names and shapes, from its config alone.

    Raises:
        ValueError: a model this project cannot prune (see `Decoder`). OSError: no such model.
    """
    try:
        config = AutoConfig.from_pretrained(name, cache_dir=cache_dir)
    except OSError as error:  # not there, not public, or no network: transformers says which
        raise OSError(f"{name} cannot be read: {error}") from error
    if quantisation := getattr(config, "quantization_config", None):
        kind = quantisation.get("quant_method", "") if isinstance(quantisation, dict) else quantisation.quant_method
        remedy = DENSE.get(str(getattr(kind, "value", kind)), "give the model it was made from")
        raise ValueError(f"{name} is quantised ({getattr(kind, 'value', kind)}): only dense weights can be pruned, {remedy}")
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder ({config.model_type}): this project prunes decoder-only models")
    made = auto_class(config)
    try:
        with init_empty_weights(include_buffers=False):
            model = made.from_config(config, dtype=dtype)
    except Exception as error:  # each of two hundred families raises what it likes
        said = " ".join(str(error).split())[:SAID]
        raise ValueError(
            f"transformers makes no language model of the config of {name} ({config.model_type}): {said}"
        ) from error
    return Decoder(model, torch.device(device))


def auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """What makes a model of a config: language models alone where transformers has them, else in their multimodal wrapper.

    Raises:
        ValueError: it knows neither.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise ValueError(f"{config.model_type} is no causal language model, alone or with images, that transformers knows")


def on_disk(
    name: str, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", cache_dir: str | None = None
) -> Decoder:
    """A model all of whose tensors are still in its checkpoint's files, `source`.

    Raises:
        ValueError: a tensor of the model that the files do not have, or a model that cannot be pruned.
    """
    decoder = outline(name, dtype=dtype, device=device, cache_dir=cache_dir)
    decoder.source = source = ModelTensors(Checkpoint(name, cache_dir), decoder.model)
    for tied, other in list(getattr(decoder.model, "all_tied_weights_keys", {}).items()):
        # A config may say "tied" of weights that are not: like transformers, believe the weights.
        if tied in source and other in source and not torch.equal(source[tied], source[other]):
            del decoder.model.all_tied_weights_keys[tied]
    if missing := [key for key in saved_names(decoder) if key not in source]:
        raise ValueError(
            f"{name} has no tensor that makes {missing[0]} of {type(decoder.model).__name__}: its config and its weights do not "
            "belong together, or --memory resident reads what streaming cannot"
        )
    return decoder


def load_tokenizer(name: str, cache_dir: str | None = None):
    """The model's own tokenizer.

    A LLaMA checkpoint with nothing but SentencePiece's `tokenizer.model` is read as the published code read it: with BOS
    unless its config says otherwise, whatever that calls the class (conversions of LLaMA-1 say "LLaMATokenizer", and some
    have empty special tokens). transformers 5 alone would leave BOS out and split the first word differently.
    """

    def find(file: str) -> str | None:
        return cached_file(name, file, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False)

    config = AutoConfig.from_pretrained(name, cache_dir=cache_dir)
    if config.model_type != "llama" or not find("tokenizer.model") or find("tokenizer.json"):
        return AutoTokenizer.from_pretrained(name, cache_dir=cache_dir)
    path = find("tokenizer_config.json")
    said = json.loads(Path(path).read_text()) if path else {}
    missing = {key: value for key, value in LLAMA_TOKENS.items() if said.get(key) in (None, "")}
    return LlamaTokenizer.from_pretrained(name, cache_dir=cache_dir, **missing)


def needs_bos(decoder: Decoder) -> bool:
    """Whether a model's family was trained with BOS before every text, and needs it: Gemma 1 to 4 and what derives from them."""
    return any(family in decoder.model.config.model_type for family in NEED_BOS)


def dense_tensors(name: str, decoder: Decoder, cache_dir: str | None = None) -> ModelTensors:
    """The tensors that a model was loaded from, in the files of its checkpoint."""
    return decoder.source if decoder.source is not None else ModelTensors(Checkpoint(name, cache_dir), decoder.model)


def saved_names(decoder: Decoder) -> list[str]:
    """The tensors a checkpoint must hold: all of the state but those that are tied to another."""
    tied = set(getattr(decoder.model, "all_tied_weights_keys", {}))
    return [key for key in decoder.model.state_dict() if key not in tied]


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is the first GPU where there is one, else the CPU.

    Raises:
        ValueError: a GPU that is not there, or another kind of device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device} is none of auto, cpu, cuda and cuda:N") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device} is neither a CPU nor a GPU of torch.cuda: use --device cpu")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device} is not there ({torch.cuda.device_count()} GPUs visible): use --device cpu")
    return resolved


def resolve_dtype(dtype: str, config, device: torch.device) -> torch.dtype:
    """The torch dtype for a --dtype value; see `load`."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type != "cpu":
        return getattr(config, "dtype", None) or torch.float16
    capabilities = torch.cpu.get_capabilities()
    fast = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32
