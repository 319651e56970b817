"""Honest measurement: one model on a text, a swap with its trivial rival, arms of a recipe side by side."""

from dovetail.report.compare import compare
from dovetail.report.evaluate import evaluate
from dovetail.report.results import Report
from dovetail.report.swap import swap

__all__ = ["Report", "compare", "evaluate", "swap"]
