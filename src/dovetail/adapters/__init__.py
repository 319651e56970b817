"""Adapters: a trained model changed cheaply, by small modules that stand around its weights.

A file put in this folder registers itself.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

from dovetail.adapters.base import AdapterSpec, Segment, Site, sites  # noqa: E402
from dovetail.adapters.files import load_adapter, save_adapter  # noqa: E402
from dovetail.adapters.lora import Lora  # noqa: E402
from dovetail.adapters.many import (  # noqa: E402
    active,
    adapt,
    adapters,
    merge,
    merge_and_forget,
    off,
    remove,
    route,
    trainable,
    unmerge,
    use,
)

__all__ = [
    "AdapterSpec", "Lora", "Segment", "Site", "active", "adapt", "adapters", "load_adapter",
    "merge", "merge_and_forget", "off", "remove", "route", "save_adapter",
    "sites", "trainable", "unmerge", "use",
]  # fmt: skip
