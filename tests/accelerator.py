"""A stand-in for a GPU on a machine without one: a device of its own for torch, "standin", that computes on the CPU.

Its tensors live on another device for everybody who asks (`tensor.device`, autograd, transformers), host and device tensors
cannot be mixed, and what would cross the bus or make the host wait is counted in `TRAFFIC`. The arithmetic below is the
CPU's, so results are bitwise the CPU's. Built on torch's private-use device with a Python backend.

What a GPU does apart from that it does not tell: its kernels' rounding, its memory, the order of streams.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from lib.models import loading

aten = torch.ops.aten
FREE = 2**33  # bytes that the device says it has left

# uploads: copies to the device; downloads: copies to the host; waits: how often the host has to wait until the device is idle,
# which both do (an upload unless it is `non_blocking`), and so does every look at a value.
TRAFFIC: Counter = Counter()

# Operators whose result's shape, or whose error, depends on values: the host looks at them.
LOOKS = {
    aten._local_scalar_dense.default,  # item(), float(), bool(), if
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten._linalg_check_errors.default,  # of linalg.cholesky, inv, solve
    aten.cholesky_inverse.default,  # checks its error code, too
    aten.bincount.default,
}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default}
FACTORIES = [
    "empty.memory_format",
    "empty_strided",
    "empty_permuted",
    "zeros",
    "ones",
    "full",
    "eye",
    "eye.m",
    "arange",
    "arange.start",
    "arange.start_step",
    "linspace",
    "logspace",
    "scalar_tensor",
    "rand",
    "randn",
    "randint",
    "randint.low",
    "randperm",
    "tril_indices",
    "triu_indices",
]


class _Module(_DummyBackendModule):
    """What torch.cuda is to a GPU: `torch.get_device_module("standin")`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def mem_get_info(self, device=None) -> tuple[int, int]:
        return FREE, FREE

    def max_memory_allocated(self, device=None) -> int:
        return 0

    def reset_peak_memory_stats(self, device=None) -> None:
        pass

    def empty_cache(self) -> None:
        TRAFFIC["waits"] += 1

    def synchronize(self, device=None) -> None:
        TRAFFIC["waits"] += 1

    def get_rng_state(self, device=None) -> torch.Tensor:
        return torch.empty(0)

    def set_rng_state(self, state, device=None) -> None:
        pass

    def get_device_properties(self, device=None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=FREE, name="standin")


_setup_privateuseone_for_python_backend("standin", backend_module=_Module())
DEVICE = torch.device("standin", 0)


def install() -> None:
    """Let `--device standin` be a device of the commands in this process."""
    resolve = loading.resolve_device
    loading.resolve_device = lambda device: DEVICE if str(device).startswith("standin") else resolve(device)


class DeviceTensor(torch.Tensor):
    """A tensor on the stand-in; `inner` holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool | None = None):
        if requires_grad is not None:  # accelerate makes a parameter of the type of the one before
            return torch.nn.Parameter(inner, requires_grad)
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE, requires_grad=False
        )
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> list:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()  # a wrapper's own is 0

    def numpy(self, *, force: bool = False):
        raise TypeError("can't convert a standin:0 device type tensor to numpy, use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in COPIES:
            leaves = _count_copy(func, args, kwargs)
        else:
            _check(func, args, kwargs)
            leaves = False
        if kwargs.get("device") is not None and not leaves:
            kwargs["device"] = torch.device("cpu")
        own = {id(leaf.inner): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DeviceTensor)}

        def unwrap(value):
            return value.inner if isinstance(value, DeviceTensor) else value

        def wrap(value):
            if not isinstance(value, torch.Tensor) or leaves:
                return value
            return own.get(id(value)) if id(value) in own else DeviceTensor(value)

        results = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        for tensor in own.values():
            if tensor.shape != tensor.inner.shape:
                raise NotImplementedError(f"{func} changed the shape of a tensor of the stand-in in place")
        return tree_map(wrap, results)


def _count_copy(func, args: tuple, kwargs: dict) -> bool:
    """Count a copy if it is one between devices; whether the result is not on the stand-in."""
    if func is aten._to_copy.default:
        source, target = args[0].device, kwargs.get("device") or args[0].device
        blocking = not kwargs.get("non_blocking")
    else:
        source, target = args[1].device, args[0].device
        blocking = not (kwargs.get("non_blocking") or args[2:] == (True,))
    if source != target and target.type != "meta":
        TRAFFIC["downloads" if target.type == "cpu" else "uploads"] += 1
        TRAFFIC["waits"] += blocking or target.type == "cpu"  # memory that is not pinned is waited for on its way to the host
    return target.type != DEVICE.type


def _check(func, args: tuple, kwargs: dict) -> None:
    """Refuse an operator on tensors of both devices; count one that makes the host wait."""
    indices = ()
    if func in INDEXED:
        indices = [index for index in args[1] if index is not None]
        filled = func is not aten.index.Tensor and args[2].numel() == 1  # x[mask] = 0: no positions are needed
        TRAFFIC["waits"] += sum(index.dtype in (torch.bool, torch.uint8) for index in indices) * (not filled)
        uploaded = sum(not isinstance(index, DeviceTensor) for index in indices)
        TRAFFIC["uploads"] += uploaded
        TRAFFIC["waits"] += uploaded
    TRAFFIC["waits"] += func in LOOKS
    for leaf in tree_leaves((args, kwargs)):
        if (
            isinstance(leaf, torch.Tensor)
            and not isinstance(leaf, DeviceTensor)
            and leaf.ndim > 0
            and not any(leaf is index for index in indices)
        ):
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, but found {DEVICE} and {leaf.device} {tuple(leaf.shape)}"
            )


def _factory(op):
    def make(*args, device=None, pin_memory=None, **kwargs):
        return DeviceTensor(op(*args, device=torch.device("cpu"), **kwargs))

    return make


_library = torch.library.Library("aten", "IMPL")
for _name in FACTORIES:
    _base, _, _overload = _name.partition(".")
    _library.impl(_name, _factory(getattr(getattr(aten, _base), _overload or "default")), "PrivateUse1")


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """How torch.tensor([...], device=...), and an index given as a list, reach a device."""
    DeviceTensor.__torch_dispatch__(aten.copy_.default, (), (target, source, non_blocking))
    return target


_library.impl("_copy_from", _copy_from, "PrivateUse1")
# For these a GPU has a kernel, and a device without one gets a formula of several operators, which round otherwise.
for _name in ("silu_backward", "mish_backward"):
    _library.impl(_name, lambda *args: None, "PrivateUse1")  # never runs: DeviceTensor is asked before


@contextmanager
def counted() -> Iterator[Counter]:
    """The traffic inside the context, known when it is left."""
    before, inside = Counter(TRAFFIC), Counter()
    yield inside
    inside.update({key: TRAFFIC[key] - before[key] for key in ("uploads", "downloads", "waits")})


def same_kernels():
    """A context for both sides of a comparison: the CPU has an attention kernel of its own, other devices do not."""
    return sdpa_kernel(SDPBackend.MATH)
