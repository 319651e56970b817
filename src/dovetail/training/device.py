"""What the device can do: which number format is fast, its peak rate, its memory."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dovetail.errors import UserError
from dovetail.kernels import twins

# Dense bf16 peaks in FLOP/s, from the makers' data sheets; the first name found in the device's name counts.
_PEAKS = {
    "H200": 989e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10": 125e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip


def choose(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises UserError for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {name!r} here: {str(error).splitlines()[0]}", remedy="use auto or cpu") from None
    if device.type == "meta" or (device.type == "cpu" and device.index):
        raise UserError(f"no device {name!r} here", remedy="use auto or cpu")
    return device


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bf16 matmuls beat fp32: CUDA from Ampere on, CPUs with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # public from torch 2.12 on
        able = torch.cpu.get_capabilities()
        return bool(able.get("amx_bf16") or able.get("avx512_bf16"))
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def multiplies_fp8(device: torch.device) -> bool:
    """Whether torch has products in fp8 there: CUDA from Ada on, CPUs."""
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 9)
    return device.type == "cpu"


def precision(wanted: str, device: torch.device) -> str:
    """ "bf16" or "none" from a recipe's autocast."""
    if wanted == "auto":
        return "bf16" if bf16_is_fast(device) and not twins.asked() else "none"
    return wanted


def autocast(chosen: str, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if chosen == "bf16" else nullcontext()


def compiled(model: Any, checkpointing: bool = False) -> Any:
    """`model` under torch.compile. With checkpointing Inductor gives buffers back as soon as they are read: kept for
    reuse, those of the feed-forwards would stand beside the attentions' all through the backward."""
    return torch.compile(model, options={"allow_buffer_reuse": False} if checkpointing else None)


def peak_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s that MFU is measured against, where the number is from): the data sheet, else a matmul timed here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, rate in _PEAKS.items():
            if known in name:
                return rate, f"data sheet, {known}, bf16"
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, f"measured, {size}³ matmul"


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on CUDA, by the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def total_memory(device: torch.device) -> int:
    """Bytes that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
