"""Makes a `Decoder` from a model's name, in memory or with its blocks left in the checkpoint, on a device and in a dtype."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from transformers.utils import logging as transformers_logging

from lib.errors import InvalidInput
from lib.models import checks
from lib.models.config import auto_class, read_config, reading
from lib.models.decoder import Decoder
from lib.models.files.checkpoint import Checkpoint
from lib.models.files.conversion import ModelTensors
from lib.models.host import keep_memory, return_large_memory

logger = logging.getLogger(__name__)

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

    Args:
        dtype: "auto" is the checkpoint's dtype on a GPU, but float16 instead of bfloat16 if the GPU does not compute in that.
            On a CPU it is bfloat16 if the CPU has matrix instructions for it, otherwise float32.
        streamed: load only embeddings, final norm and LM head, and leave the blocks in the checkpoint's files.

    Raises:
        InvalidInput: the model cannot be pruned (see `Decoder`), or its weights are damaged, quantised or do not belong to its
            config.
        MissingInput: its folder has no weights, or not all of them.
    """
    device = resolve_device(device)
    config = read_config(name, trust_remote_code=trust_remote_code)
    _require_dtypes(name, trust_remote_code)
    run_dtype = resolve_dtype(dtype, config, device)
    if dtype == "auto" and run_dtype == torch.float16 != getattr(config, "dtype", None) and not _has_bfloat16(device):
        logger.warning("%s does not compute in bfloat16 itself: using float16 instead", device)
    if not streamed:
        keep_memory()
        placed = {"device_map": {"": device}} if device.type != "cpu" else {}
        with reading(name, "its weights", "restore the files, or download them again"), _quiet():
            model, loading_info = auto_class(config).from_pretrained(
                name, dtype=run_dtype, trust_remote_code=trust_remote_code, ignore_mismatched_sizes=True,
                output_loading_info=True, **placed,
            )  # fmt: skip
        _require_whole(name, loading_info)
        return Decoder(model, device)

    return_large_memory()
    decoder = on_disk(name, dtype=run_dtype, device=device, trust_remote_code=trust_remote_code)
    model, path = decoder.model, decoder.prefixes[0].removesuffix("0.")
    for key in saved_names(decoder):
        if not key.startswith(path):
            set_module_tensor_to_device(model, key, device, value=decoder.source[key].to(device, run_dtype, copy=True))
    model.tie_weights(recompute_mapping=False)  # `on_disk` has found out which weights are tied
    for key, buffer in model.named_buffers():
        if buffer.device.type != "meta":
            set_module_tensor_to_device(model, key, device, value=buffer)
    checks.require_runs_alone(decoder)
    return decoder


def outline(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Decoder:
    """A model with its parameters on the meta device: only names and shapes, which its config is enough for.

    Raises:
        InvalidInput: the model cannot be pruned (see `Decoder`), or its config is refused by `read_config`.
    """
    config = read_config(name, trust_remote_code=trust_remote_code)
    with (
        reading(name, "its config.json", "no model can be made of it, restore it or download the model again"),
        init_empty_weights(include_buffers=False),
    ):
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return Decoder(model, torch.device(device))


def on_disk(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Decoder:
    """A model whose tensors are all still in its checkpoint's files, which are its `source`.

    Raises:
        InvalidInput: the files are damaged, lack a tensor of the model or have it in another shape, or the model cannot be
            pruned.
        MissingInput: there are no weights, or a file of them is missing.
    """
    decoder = outline(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with reading(name, "its weights", "restore the files, or download them again"):
        decoder.source = source = ModelTensors(Checkpoint(name), decoder.model)
    for tied, other in list(getattr(decoder.model, "all_tied_weights_keys", {}).items()):
        # A config may call weights tied that are not. Like transformers, believe the weights.
        if tied in source and other in source and not torch.equal(source[tied], source[other]):
            del decoder.model.all_tied_weights_keys[tied]
    if missing := [key for key in saved_names(decoder) if key not in source]:
        raise InvalidInput(
            f"{name} has no tensor that makes {missing[0]} of {type(decoder.model).__name__}: its config and its weights do "
            "not belong together, or only --memory resident can read them"
        )
    state = decoder.model.state_dict()
    _require_shapes(name, [(key, source.shapes[key], state[key].shape) for key in saved_names(decoder)])
    return decoder


def dense_tensors(name: str, decoder: Decoder) -> ModelTensors:
    """The tensors that a model was loaded from, in the files of its checkpoint."""
    return decoder.source if decoder.source is not None else ModelTensors(Checkpoint(name), decoder.model)


def require_restorable(folder: str, decoder: Decoder) -> None:
    """Refuse now a model that `restore` could not do its work on.

    Raises:
        InvalidInput: a tensor that only a resident model can be made from.
    """
    dense = dense_tensors(folder, decoder)
    for i, prefix in enumerate(decoder.prefixes):
        for matrix in decoder.matrices(i).values():
            if prefix + matrix.tensor_name not in dense:
                raise InvalidInput(
                    f"{folder} has no tensor for {prefix}{matrix.tensor_name} by itself: give the flag that is searched a value"
                )


@torch.no_grad()
def restore(name: str, decoder: Decoder) -> None:
    """Give the matrices of a model's blocks their values in the checkpoint again, after a run has changed them.

    A streamed model reads the checkpoint's files again instead of any other `source` it has been given. `require_restorable` says
    whether it can be done.
    """
    dense = ModelTensors(Checkpoint(name), decoder.model)
    if decoder.source is not None:
        decoder.source = dense
        return
    for i, prefix in enumerate(decoder.prefixes):
        state = decoder.blocks[i].state_dict()
        for tensor in {matrix.tensor_name for matrix in decoder.matrices(i).values()}:
            state[tensor].copy_(dense[prefix + tensor])


def saved_names(decoder: Decoder) -> list[str]:
    """The tensors that a checkpoint must hold: the model's state without tensors that are tied to another one."""
    tied = set(getattr(decoder.model, "all_tied_weights_keys", {}))
    return [key for key in decoder.model.state_dict() if key not in tied]


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device for a --device value; "auto" is the first GPU if there is one, otherwise the CPU.

    Raises:
        InvalidInput: the GPU is not there, or the device is of another kind.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise InvalidInput(f"device {device} is not one of auto, cpu, cuda and cuda:N") from error
    if resolved.type not in ("cpu", "cuda"):
        raise InvalidInput(f"device {device} is neither a CPU nor a GPU of torch.cuda: use --device cpu")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InvalidInput(f"device {device} is not there ({torch.cuda.device_count()} GPUs visible): use --device cpu")
    return resolved


def _has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself; the T4 and V100, for example, emulate it slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_dtype(dtype: str, config, device: torch.device) -> torch.dtype:
    """The torch dtype for a --dtype value; see `load`."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type != "cpu":
        stored = getattr(config, "dtype", None) or torch.float16
        return torch.float16 if stored == torch.bfloat16 and not _has_bfloat16(device) else stored
    capabilities = torch.cpu.get_capabilities()
    fast = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside the context, transformers does not print its table of mismatched tensors: an error says it in one line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _require_dtypes(name: str, trust_remote_code: bool) -> None:
    """See `checks.require_dtypes`. Files that cannot be read here are left to whoever reads them next."""
    try:
        checkpoint = Checkpoint(name)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):  # of an index, too
        return
    checks.require_dtypes(checkpoint, lambda: outline(name, trust_remote_code=trust_remote_code).model)


def _require_whole(name: str, loading_info: dict) -> None:
    """Raise InvalidInput if some of the model's weights were not loaded but made at random; warn of unused weights."""
    _require_shapes(name, sorted(loading_info["mismatched_keys"]))
    if missing := sorted(loading_info["missing_keys"]):
        raise InvalidInput(
            f"{name} has no weights for {missing[0]}, and {len(missing) - 1} more tensors of the model in its config.json: "
            "the two do not belong together, or a file is missing; download the model again"
        )
    if unused := sorted(loading_info["unexpected_keys"]):
        logger.warning("%s: %d tensors are not part of the model in its config.json, such as %s", name, len(unused), unused[0])


def _require_shapes(name: str, shapes: list[tuple]) -> None:
    """Raise InvalidInput if the two shapes of a (tensor, shape in the file, shape in the model) differ."""
    for key, in_file, in_model in shapes:
        if in_file != in_model:
            raise InvalidInput(
                f"{name}: {key} is {tuple(in_file)} in its weights and {tuple(in_model)} by its config.json: the two do not "
                "belong together, download the model again"
            )
