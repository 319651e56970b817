"""The interchangeable parts. A file put in one of these folders registers itself: nothing else to edit.

Every registered spec of this package is an attribute here: `parts.Attention`, `parts.Rope`, `parts.RmsNorm`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from dovetail.spec import entries

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)


def __getattr__(name: str) -> Any:
    for entry in entries():
        if entry.cls.__name__ == name:
            return entry.cls
    raise AttributeError(f"no part {name!r}; see dovetail.registry(category)")


def __dir__() -> list[str]:
    return sorted(entry.cls.__name__ for entry in entries())
