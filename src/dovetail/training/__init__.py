"""The loop, optimisers, schedules, checkpoints and preflight."""

from dovetail.training.loop import Result, evaluate, fit
from dovetail.training.preflight import preflight
from dovetail.training.recipe import Recipe

__all__ = ["Recipe", "Result", "evaluate", "fit", "preflight"]
