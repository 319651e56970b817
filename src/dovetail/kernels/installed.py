"""What is installed beside torch. Constants: torch.compile does not look into a search for a module."""

from __future__ import annotations

import importlib.util

TRITON = importlib.util.find_spec("triton") is not None
