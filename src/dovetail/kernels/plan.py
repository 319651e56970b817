"""What a choice of kernel says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """The path taken, by the name that its kernels go by ("sdpa", "triton", "plain"), and why, for people."""

    path: str
    why: str

    def falls_back(self, device: str) -> bool:
        """Whether it is plain torch where others of `device` have a kernel: the reference, cut to fit the memory."""
        return self.path in (_PLAIN | _PLAIN_ON_CUDA if device.startswith("cuda") else _PLAIN)


_PLAIN = {"reference", "tiled", "step by step"}
_PLAIN_ON_CUDA = {"bands", "chunked", "scan", "plain"}
