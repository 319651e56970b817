"""Systems: one file each. A model is an arrangement of parts; a family is its config and key map, both ways."""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

from dovetail.models.build import build, materialise  # noqa: E402

__all__ = ["build", "materialise"]
