"""Adapters: a trained model changed cheaply, by small modules that stand around its weights.

A file put in this folder registers itself.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

from dovetail.adapters.adalora import Adalora  # noqa: E402
from dovetail.adapters.base import AdapterSpec, Segment, Site, sites  # noqa: E402
from dovetail.adapters.bitfit import BitFit  # noqa: E402
from dovetail.adapters.bottleneck import Bottleneck, drop_lower  # noqa: E402
from dovetail.adapters.combine import Combined, combine  # noqa: E402
from dovetail.adapters.dora import Dora  # noqa: E402
from dovetail.adapters.extract import Account, extract  # noqa: E402
from dovetail.adapters.files import load_adapter, save_adapter  # noqa: E402
from dovetail.adapters.fusion import Fusion  # noqa: E402
from dovetail.adapters.ia3 import Ia3  # noqa: E402
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
from dovetail.adapters.prefix import Prefix  # noqa: E402
from dovetail.adapters.prompt import Prompt  # noqa: E402
from dovetail.adapters.ptuning import PTuning  # noqa: E402
from dovetail.adapters.starts import Gaussian, Loftq, Orthogonal, Pissa, Uniform  # noqa: E402
from dovetail.adapters.virtual import flatten  # noqa: E402

__all__ = [
    "Account", "Adalora", "AdapterSpec", "BitFit", "Bottleneck", "Combined", "Dora", "Fusion", "Gaussian", "Ia3", "Loftq", "Lora", "Orthogonal", "PTuning", "Pissa", "Prefix", "Prompt", "Segment", "Site", "Uniform",
    "active", "adapt", "adapters", "combine", "drop_lower", "extract", "flatten", "load_adapter",
    "merge", "merge_and_forget", "off", "remove", "route", "save_adapter",
    "sites", "trainable", "unmerge", "use",
]  # fmt: skip
