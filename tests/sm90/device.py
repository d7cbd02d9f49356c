"""An H100 that is not there: PyTorch and Triton take the process to have one.

With it fake tensors live on "cuda:0", and Dynamo, AOTAutograd, Inductor and Triton do what they do
for an NVIDIA GPU of compute capability 9.0, down to the machine code. Nothing can run on it.

`install` changes the process for good, in six places:
    C++          Autograd asks for a guard of the device and for the accelerator. A build without
                 CUDA has neither: it gets a guard (that PyTorch replaces with its own for fake
                 devices), and the functions that say "built without CUDA" are replaced in the table
                 of virtual functions of PyTorch's hooks.
    torch.cuda   answers as with one H100.
    Dynamo       its interface of the device, likewise.
    Triton       a driver that knows the target, compiles, and launches nothing.
    Inductor     computes constants of a graph ahead; here on the CPU.
    attention    `scaled_dot_product_attention` chooses a kernel in C++, with the GPU's help.

Works with torch 2.11 (a build with CUDA) and 2.13 (one without), on x86-64.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import mmap
import platform
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch._inductor.compile_fx  # whatever looks at `torch.cuda` while it is loaded, before
from torch import Tensor
from torch._dynamo import device_interface
from torch._inductor.fx_passes import joint_graph
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode

SKIP = 77  # what a program ends with that cannot have such a device

_CAPABILITY = (9, 0)
_MEMORY = 80 * 2**30
_CUDA = 1  # `c10::DeviceType::CUDA`
_SLOTS = 64  # at least as many as any of the tables of virtual functions has
_RTTI = 2  # words before such a table

_PROPERTIES = types.SimpleNamespace(  # of an H100 SXM
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=_MEMORY,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    L2_cache_size=52428800,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    is_integrated=0,
    is_multi_gpu_board=0,
    gcnArchName="",
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
)


class Unavailable(Exception):
    """This machine, or this version of PyTorch, cannot have such a device; says why."""


def install_or_leave() -> None:
    """Take the process to have an H100; where that cannot be, say why and end with `SKIP`."""
    try:
        install()
    except Unavailable as error:
        print(error)
        sys.exit(SKIP)


def install() -> None:
    """Take the process to have an H100.

    Raises:
        Unavailable: something is missing that this needs.
    """
    _check()
    try:
        _install_guard()
        _install_hooks()
        _install_cuda()
        _install_interface()
        _install_driver()
        _install_constants()
    except (AttributeError, ImportError, ValueError) as error:
        raise Unavailable(f"torch {torch.__version__} has changed: {error}") from error
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != "cuda":
        raise Unavailable(f"torch {torch.__version__}: its accelerator is {accelerator}")
    torch.nn.functional.scaled_dot_product_attention = _attention  # type: ignore[assignment]


def _check() -> None:
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        raise Unavailable("the functions that stand in for C++ ones are for x86-64 Linux")
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("triton is not installed (pip install -c constraints.txt triton)")


# -- C++


def _keep(*objects: object) -> None:
    """C++ holds pointers into these until after Python is gone."""
    for one in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


def _function(value: int) -> int:
    """Address of a function that returns `value` whatever it is given, and needs no Python."""
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page[:6] = b"\xb8" + value.to_bytes(4, "little") + b"\xc3"  # mov eax, value; ret
    memory = (ctypes.c_char * 6).from_buffer(page)
    _keep(page, memory)
    return ctypes.addressof(memory)


def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))


def _install_guard() -> None:
    """A guard that says there is no device, if there is none; PyTorch puts its own in its place."""
    registry = (ctypes.c_void_p * 32).in_dll(
        _library("libc10.so"), "_ZN3c104impl26device_guard_impl_registryE"
    )
    if not registry[_CUDA]:
        table = (ctypes.c_void_p * _SLOTS)(*[_function(0)] * _SLOTS)
        guard = (ctypes.c_void_p * 1)(ctypes.addressof(table))
        _keep(table, guard)
        registry[_CUDA] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()


def _install_hooks() -> None:
    """`at::detail::getCUDAHooks()` with a copy of its table, in which a device is built for, there,
    and current."""
    get = _library("libtorch_cpu.so")._ZN2at6detail12getCUDAHooksEv
    get.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(get())
    word = ctypes.sizeof(ctypes.c_void_p)
    words = ctypes.c_void_p * (_SLOTS + _RTTI)
    assert hooks.value is not None
    table = words(*words.from_address(hooks.value - _RTTI * word))
    # after two destructors: isBuilt, isAvailable, hasPrimaryContext, init, deviceCount,
    # setCurrentDevice, getCurrentDevice, exchangeDevice, maybeExchangeDevice
    for slot, value in enumerate((1, 1, 0, 0, 1, 0, 0, 0, 0), start=_RTTI + 2):
        table[slot] = _function(value)
    _keep(table)
    hooks.value = ctypes.addressof(table) + _RTTI * word


# -- Python


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _answer(value: Any) -> Any:
    """A function that says `value` whatever it is asked."""
    return lambda *_, **__: value


_ANSWERS: dict[str, Any] = {  # a function for each: Dynamo tells them apart by identity
    "is_available": _answer(True),
    "is_initialized": _answer(True),
    "_is_compiled": _answer(True),
    "is_bf16_supported": _answer(True),
    "is_tf32_supported": _answer(True),
    "is_current_stream_capturing": _answer(False),
    "device_count": _answer(1),
    "current_device": _answer(0),
    "_exchange_device": _answer(0),
    "_maybe_exchange_device": _answer(0),
    "set_device": _answer(None),
    "init": _answer(None),
    "_lazy_init": _answer(None),
    "synchronize": _answer(None),
    "current_stream": _answer(None),
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": _answer(None),
    "manual_seed": _answer(None),
    "manual_seed_all": _answer(None),
    "get_device_properties": _answer(_PROPERTIES),
    "get_device_capability": _answer(_CAPABILITY),
    "get_device_name": _answer(_PROPERTIES.name),
    "get_arch_list": _answer(["sm_90"]),
    "memory_allocated": _answer(0),
    "mem_get_info": _answer((_MEMORY, _MEMORY)),
    "device": contextlib.nullcontext,
    "stream": contextlib.nullcontext,
}


def _install_cuda() -> None:
    for name, answer in _ANSWERS.items():
        if not hasattr(torch.cuda, name):
            raise AttributeError(f"torch.cuda has no {name}")
        setattr(torch.cuda, name, answer)
    torch.version.cuda = "13.0"  # type: ignore[assignment]
    torch._C._cuda_getCurrentRawStream = _answer(0)  # type: ignore[attr-defined]
    torch._C._cuda_cudaCachingAllocator_is_enabled = _answer(True)  # type: ignore[attr-defined]
    # "a device is available" would let fake tensors be made by way of real ones
    fake_tensor.init_gpu_context = _nothing
    fake_tensor.FakeTensorMode.avoid_device_init = property(_answer(True))  # type: ignore


def _install_interface() -> None:
    cuda = device_interface.CudaInterface
    for name in ("current_device", "set_device", "device_count", "synchronize"):
        setattr(cuda, name, staticmethod(_ANSWERS[name]))
    for name in ("get_device_properties", "memory_allocated", "is_bf16_supported"):
        setattr(cuda, name, staticmethod(_ANSWERS[name]))
    for name in ("exchange_device", "maybe_exchange_device", "get_raw_stream"):
        setattr(cuda, name, staticmethod(_answer(0)))
    cuda.device = cuda.stream = contextlib.nullcontext  # type: ignore
    device_interface.device_interfaces.clear()
    device_interface._device_initialized = True
    for device in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(device, cuda)
    device_interface.register_interface_for_device("cpu", device_interface.CpuInterface)


# -- Triton


class _Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": _PROPERTIES.shared_memory_per_block_optin,
            "max_num_regs": _PROPERTIES.regs_per_multiprocessor,
            "multiprocessor_count": _PROPERTIES.multi_processor_count,
            "warpSize": _PROPERTIES.warp_size,
        }

    def load_binary(self, *args: Any) -> tuple[int, ...]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, most threads


class _Driver:
    """Compiles for sm_90; what it would launch is nothing."""

    utils = _Utilities()
    get_current_device = get_current_stream = staticmethod(_answer(0))
    launcher_cls = staticmethod(_answer(_nothing))
    is_active = staticmethod(_answer(True))

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * _CAPABILITY[0] + _CAPABILITY[1], _PROPERTIES.warp_size)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def _install_driver() -> None:
    import triton
    from triton.backends import backends

    triton.runtime.driver.set_active(_Driver())
    nvidia = backends["nvidia"]
    backends["nvidia"] = type(nvidia)(compiler=nvidia.compiler, driver=_Driver)  # type: ignore


# -- Inductor


class _OnCpu(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def _install_constants() -> None:
    folder = joint_graph.UniformValueConstantFolder
    deduce = folder._deduce_value

    def on_cpu(self: Any, node: Any) -> Any:
        with _OnCpu():
            return deduce(self, node)

    folder._deduce_value = on_cpu  # type: ignore[method-assign]


# -- attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What an H100 takes: flash attention for half precision, unless there is a mask."""
    groups = query.shape[1] // key.shape[1] if enable_gqa else 1
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    ops = torch.ops.aten
    if attn_mask is None and query.dtype != torch.float32:
        flash = ops._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            allowed = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = allowed.masked_fill(attn_mask.logical_not(), -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    efficient = ops._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
