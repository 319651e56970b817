"""What is minimised. A file put in this folder registers itself."""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

from dovetail.objectives.base import IGNORED, Batch, Loss, Objective, Term  # noqa: E402

__all__ = ["IGNORED", "Batch", "Loss", "Objective", "Term"]
