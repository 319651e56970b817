"""Healing: a short training after a swap, by the training room's own loop."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dovetail import hub
from dovetail.errors import StoppedError, UserError
from dovetail.objectives.distillation import Distillation
from dovetail.report.measure import device_of
from dovetail.report.recipe import Heal
from dovetail.training import Recipe, fit
from dovetail.training.recipe import Data


def heal(model: Any, how: Heal, seed: int, original: Any) -> Any:
    """`model` trained on as `how` says, as a new model of the same dtypes and device; `model` stays as it is.

    seed: of the order of the rows. original: the model before the swap, from which a distillation learns unless it
    names a teacher. Raises UserError for a model without a checkpoint's tokenizer, SpecError for an objective that does
    not fit, RunError as training does.
    """
    origin = getattr(model, "origin", None)
    if origin is None or origin.folder is None:
        raise UserError(
            "healing needs a tokenizer, and this model has none: it came from no checkpoint, or its ids were changed",
            remedy="save it beside a tokenizer (dt.save(..., tokenizer_from=folder)) and load it again",
        )
    with tempfile.TemporaryDirectory(prefix="dovetail-heal-") as scratch, _same_random_numbers():
        start, end = Path(scratch) / "start", Path(scratch) / "end"
        hub.save(model, start, format="dovetail", tokenizer_from=origin.folder)
        train = how.train.model_copy(update={"seed": seed, "device": str(device_of(model))})
        data = Data(train=how.data, pack=how.pack, cache=how.cache)  # type: ignore[arg-type]
        objective: Any = how.objective
        if isinstance(objective, Distillation) and objective.teacher is None:
            teacher = Path(scratch) / "teacher"
            hub.save(original, teacher, format="dovetail", tokenizer_from=origin.folder)
            objective = objective.replace(teacher=str(teacher))
        recipe = Recipe(model=str(start), data=data, objective=objective, train=train, out=str(end))
        try:
            fit(recipe, progress=False)
        except StoppedError as stop:
            raise StoppedError(f"{stop.what}, while healing", remedy="nothing of it is kept: begin anew") from None
        healed = hub.load(end, device=device_of(model))
    stored = dict(model.named_parameters())
    for name, parameter in healed.named_parameters():
        parameter.data = parameter.data.to(stored[name].dtype)
    healed.origin = origin
    return healed


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Training seeds the global generators; outside they go on as if it had not."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
