"""A model's name to a `Decoder`: in memory, or its blocks left in the checkpoint; on which device and in which dtype."""

import json
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaTokenizer,
    PretrainedConfig,
    __version__,
)
from transformers.utils import logging as transformers_logging

from lib.errors import InvalidInput, Refusal
from lib.models import checks
from lib.models.decoder import Decoder
from lib.models.files.checkpoint import Checkpoint
from lib.models.files.conversion import ModelTensors
from lib.models.host import is_out_of_memory, keep_memory, return_large_memory

logger = logging.getLogger(__name__)

LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}  # of LLaMA-1 and 2
# How a checkpoint that was published in few bits is had in 16, by its quant_method.
DENSE = {
    "fp8": "dequantise it first (FineGrainedFP8Config(dequantize=True) of transformers, then save_pretrained)",
    "mxfp4": "dequantise it first (Mxfp4Config(dequantize=True) of transformers, then save_pretrained)",
}
LIBRARY = Path(__file__).resolve().parents[1]  # our own code
SAID = 200  # characters of another library's message that are passed on
TABLE_OFFSET = 2  # rows before the first position in the tables of OPT and its like
NEED_BOS = ("gemma",)  # in a config's model_type: models that are lost in a window that does not begin with BOS
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name: str,
    *,
    dtype: str = "auto",
    device: str | torch.device = "auto",
    streamed: bool = False,
    trust_remote_code: bool = False,
) -> Decoder:
    """Load a local or hub model for inference and pruning.

    `dtype` "auto": the checkpoint's own on a GPU (float16 for bfloat16 where the GPU has none); on a CPU bfloat16 where it has bfloat16 matrix instructions, else
    float32. `streamed`: only embeddings, final norm and LM head are loaded, blocks stay in the checkpoint's files.

    Raises:
        ValueError: a model this project cannot prune (see `Decoder`), or weights that are damaged or not the config's.
    """
    device = resolve_device(device)
    config = read_config(name, trust_remote_code=trust_remote_code)
    run_dtype = resolve_dtype(dtype, config, device)
    if dtype == "auto" and run_dtype == torch.float16 != getattr(config, "dtype", None) and not _has_bfloat16(device):
        logger.warning("%s has no bfloat16 of its own: computing in float16", device)
    if not streamed:
        keep_memory()
        placed = {"device_map": {"": device}} if device.type != "cpu" else {}
        with reading(name, "its weights", "restore the files, or download them again"), _quiet():
            model, found = auto_class(config).from_pretrained(
                name, dtype=run_dtype, trust_remote_code=trust_remote_code, ignore_mismatched_sizes=True,
                output_loading_info=True, **placed,
            )  # fmt: skip
        _require_whole(name, found)
        return Decoder(model, device)

    return_large_memory()
    decoder = on_disk(name, dtype=run_dtype, device=device, trust_remote_code=trust_remote_code)
    model, path = decoder.model, decoder.prefixes[0].removesuffix("0.")
    for key in saved_names(decoder):
        if not key.startswith(path):
            set_module_tensor_to_device(model, key, device, value=decoder.source[key].to(device, run_dtype, copy=True))
    model.tie_weights(recompute_mapping=False)  # as `on_disk` found them
    for key, buffer in model.named_buffers():
        if buffer.device.type != "meta":
            set_module_tensor_to_device(model, key, device, value=buffer)
    checks.require_runs_alone(decoder)
    return decoder


def read_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """A model's config.

    Raises:
        ValueError: damaged, of an unknown kind, in need of --trust_remote_code, or of a model this project cannot prune.
    """
    remedy = "restore it, or download the model again"
    with reading(name, "its config.json", remedy):
        said, _ = PretrainedConfig.get_config_dict(name)
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


def outline(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Decoder:
    """A model with its parameters on the meta device: names and shapes, from its config alone.

    Raises:
        ValueError: a model this project cannot prune (see `Decoder`), or a config as in `read_config`.
    """
    config = read_config(name, trust_remote_code=trust_remote_code)
    with (
        reading(name, "its config.json", "no model can be made of it, restore it or download the model again"),
        init_empty_weights(include_buffers=False),
    ):
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return Decoder(model, torch.device(device))


def auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """What makes a model of a config: of a language model alone, or where transformers has none, in its multimodal wrapper."""
    wrapped = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if wrapped else AutoModelForCausalLM


def on_disk(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Decoder:
    """A model all of whose tensors are still in its checkpoint's files, `source`.

    Raises:
        ValueError: files that are damaged, do not have a tensor of the model, or have it in another shape; or a model that
            cannot be pruned.
    """
    decoder = outline(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with reading(name, "its weights", "restore the files, or download them again"):
        decoder.source = source = ModelTensors(Checkpoint(name), decoder.model)
    for tied, other in list(getattr(decoder.model, "all_tied_weights_keys", {}).items()):
        # A config may say "tied" of weights that are not: like transformers, believe the weights.
        if tied in source and other in source and not torch.equal(source[tied], source[other]):
            del decoder.model.all_tied_weights_keys[tied]
    if missing := [key for key in saved_names(decoder) if key not in source]:
        raise InvalidInput(
            f"{name} has no tensor that makes {missing[0]} of {type(decoder.model).__name__}: its config and its weights do not "
            "belong together, or --memory resident reads what streaming cannot"
        )
    state = decoder.model.state_dict()
    _require_shapes(name, [(key, source.shapes[key], state[key].shape) for key in saved_names(decoder)])
    return decoder


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """The model's own tokenizer.

    A LLaMA checkpoint with nothing but SentencePiece's `tokenizer.model` is read as the published code read it: with BOS
    unless its config says otherwise, whatever that calls the class (conversions of LLaMA-1 say "LLaMATokenizer", and some
    have empty special tokens). transformers 5 alone would leave BOS out and split the first word differently.

    Raises:
        ValueError: its files are missing or damaged.
    """

    config = read_config(name, trust_remote_code=trust_remote_code)
    with reading(name, "its tokenizer", "put the model's own files (tokenizer.json or tokenizer.model) beside its config.json"):
        if (
            config.model_type != "llama"
            or not Path(name, "tokenizer.model").is_file()
            or Path(name, "tokenizer.json").is_file()
        ):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        else:
            path = Path(name, "tokenizer_config.json")
            said = json.loads(path.read_text()) if path.is_file() else {}
            missing = {key: value for key, value in LLAMA_TOKENS.items() if said.get(key) in (None, "")}
            tokenizer = LlamaTokenizer.from_pretrained(name, **missing)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise InvalidInput(f"a {type(tokenizer).__name__} without a vocabulary")
    return tokenizer


def needs_bos(decoder: Decoder) -> bool:
    """Whether a model's family was trained with BOS before every text, and needs it: Gemma 1 to 4 and what derives from them."""
    return any(family in decoder.model.config.model_type for family in NEED_BOS)


def dense_tensors(name: str, decoder: Decoder) -> ModelTensors:
    """The tensors that a model was loaded from, in the files of its checkpoint."""
    return decoder.source if decoder.source is not None else ModelTensors(Checkpoint(name), decoder.model)


@torch.no_grad()
def restore(name: str, decoder: Decoder) -> None:
    """Make the matrices of a model's blocks the checkpoint's again, after some of them were changed in memory or elsewhere.

    Raises:
        InvalidInput: a tensor that only a resident model can be made from.
    """
    dense = ModelTensors(Checkpoint(name), decoder.model)
    if decoder.source is not None:
        decoder.source = dense
        return
    for i, prefix in enumerate(decoder.prefixes):
        state = decoder.blocks[i].state_dict()
        for tensor in {matrix.tensor_name for matrix in decoder.matrices(i).values()}:
            if prefix + tensor not in dense:
                raise InvalidInput(
                    f"{name} has no tensor for {prefix}{tensor} by itself: give the flag that is searched a value"
                )
            state[tensor].copy_(dense[prefix + tensor])


def saved_names(decoder: Decoder) -> list[str]:
    """The tensors a checkpoint must hold: all of the state but those that are tied to another."""
    tied = set(getattr(decoder.model, "all_tied_weights_keys", {}))
    return [key for key in decoder.model.state_dict() if key not in tied]


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
        raise InvalidInput(f"device {device} is none of auto, cpu, cuda and cuda:N") from error
    if resolved.type not in ("cpu", "cuda"):
        raise InvalidInput(f"device {device} is neither a CPU nor a GPU of torch.cuda: use --device cpu")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InvalidInput(f"device {device} is not there ({torch.cuda.device_count()} GPUs visible): use --device cpu")
    return resolved


def _has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16 itself; the T4 and V100, for example, emulate it slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_dtype(dtype: str, config, device: torch.device) -> torch.dtype:
    """The torch dtype for a --dtype value; see `load`."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type != "cpu":
        own = getattr(config, "dtype", None) or torch.float16
        return torch.float16 if own == torch.bfloat16 and not _has_bfloat16(device) else own
    capabilities = torch.cpu.get_capabilities()
    fast = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of what did not fit: that is said in one line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _require_whole(name: str, found: dict) -> None:
    """Raise ValueError if `found` says that some of the model's weights would be random; warn of weights it does not use."""
    _require_shapes(name, sorted(found["mismatched_keys"]))
    if missing := sorted(found["missing_keys"]):
        raise InvalidInput(
            f"{name} has no weights for {missing[0]}, and {len(missing) - 1} more tensors of the model in its config.json: "
            "the two do not belong together, or a file is missing; download the model again"
        )
    if unused := sorted(found["unexpected_keys"]):
        logger.warning("%s: %d tensors are no part of the model in its config.json, such as %s", name, len(unused), unused[0])


def _require_shapes(name: str, shapes: list[tuple]) -> None:
    """Raise ValueError if of (tensor, shape in the file, shape in the model) two differ."""
    for key, there, here in shapes:
        if there != here:
            raise InvalidInput(
                f"{name}: {key} is {tuple(there)} in its weights and {tuple(here)} by its config.json: the two do not belong "
                "together, download the model again"
            )
