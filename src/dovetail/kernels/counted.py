"""Whose way a call goes: the device that its tensors are on, or the one that a step on fake tensors is counted for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_for: str | None = None


def device_type(x: Tensor) -> str:
    """The type of the device whose path x takes."""
    return _for if _for is not None and x.device.type == "cpu" else x.device.type


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """Inside, tensors on a CPU go the way of a `device` of that type: fake ones, of a step whose memory alone is counted."""
    global _for
    before, _for = _for, device
    try:
        yield
    finally:
        _for = before
