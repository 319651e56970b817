"""Temperature scaling: one number that makes a classifier as sure as it is right. Guo et al. 2017, section 4.2."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.stats.approximation import RunningMean, iterates
from dovetail.stats.schedules import Steps


@dataclass(frozen=True)
class Calibration:
    """temperature: what to divide logits by. before, after: mean nats of the labels at 1 and at that temperature."""

    temperature: float
    before: float
    after: float


def calibrate_temperature(logits: Tensor, labels: Tensor, *, tolerance: float = 1e-12) -> Calibration:
    """The temperature T that minimises the mean of −log softmax(logits / T)[label].

    In β = 1/T the mean is convex, with slope E[E_p[z] − z_label] and curvature E[Var_p[z]]: Newton's method on a
    bracket of the root, in float64, to a relative step of `tolerance`. logits: (..., K), −inf for classes that cannot
    be. labels: (...) whole numbers of 0 to K−1; leave padding out before. Raises DataError for shapes or labels that do
    not fit, logits that are NaN or +inf, labels that are excluded by −inf, and where no T is best: every label has the
    largest logit (T -> 0), or labels have smaller logits than average (T is infinite).
    """
    z, y = _checked(logits, labels)
    flat, steep = _moments(z, y, 0.0).slope, float((z.amax(-1) - _of(z, y)).mean())
    if flat >= 0:
        raise DataError(
            "labels do not have larger logits than other classes: the best temperature is infinite",
            remedy="look whether labels and logits belong together",
        )
    if steep <= 0:
        raise DataError(
            "every label has the largest logit: the best temperature is 0",
            remedy="calibrate on held-out data, of which the model gets some wrong",
        )
    # Slopes scale with the logits: so do the first bracket and the first guess.
    low, high = 0.0, 1.0 / float(z.masked_fill(z.isinf(), 0).abs().amax())
    while _moments(z, y, high).slope < 0:
        low, high = high, 2 * high
    beta = high
    for _ in range(200):
        now = _moments(z, y, beta)
        low, high = (beta, high) if now.slope < 0 else (low, beta)
        after = beta - now.slope / now.curvature if now.curvature > 0 else math.nan
        if not low < after < high:  # also where it is NaN
            after = (low + high) / 2
        done = abs(after - beta) <= tolerance * beta
        beta = after
        if done:
            break
    return Calibration(1 / beta, _moments(z, y, 1.0).nats, _moments(z, y, beta).nats)


def calibrate_temperature_online(
    batches: Iterable[tuple[Tensor, Tensor]], steps: Steps, *, start: float = 1.0
) -> float:
    """The same by Robbins and Monro, for logits that do not fit into memory: each batch is a draw of the slope.

    batches: (logits (..., K), labels (...)). It moves log T, so that T stays positive, by −a_n times the slope in log T
    over a running mean of the curvature there, so that steps of 1/n (`harmonic()`) have the rate that is best; that
    ratio is held to ±1. start: T before the first batch. Returns T. Raises DataError as
    `calibrate_temperature`, for a start that is not positive, and where nothing came.
    """
    if not 0 < start < math.inf:
        raise DataError(f"a temperature of {start}", where="start", remedy="give a positive number")
    curvature = RunningMean()
    z, y = torch.empty(0), torch.empty(0)

    def slope(log_t: Tensor) -> Tensor:
        beta = math.exp(-float(log_t))
        now = _moments(z, y, beta)
        # d/d log T = −β d/dβ; at the root the curvature in log T is β² Var.
        usual = curvature.update(beta**2 * now.curvature)
        return (-beta * now.slope / usual.clamp_min(1e-300)).clamp(-1, 1)

    path, found = iterates(slope, math.log(start), steps), None
    for logits, labels in batches:
        z, y = _checked(logits, labels)  # what the next draw of the slope is of
        found = next(path)
    if found is None:
        raise DataError("no batch came", where="batches", remedy="give at least one")
    return math.exp(found)


class _Moments(NamedTuple):
    nats: float
    slope: float
    curvature: float


def _moments(z: Tensor, y: Tensor, beta: float) -> _Moments:
    """The mean loss at β, its slope and its curvature in β; classes of −inf have no probability at any β."""
    gone = z == -math.inf
    finite = z.masked_fill(gone, 0)
    log_p = (beta * finite).masked_fill(gone, -math.inf).log_softmax(-1)
    p = log_p.exp()
    mean = (p * finite).sum(-1)
    spread = (p * (finite - mean[..., None]) ** 2).sum(-1)
    return _Moments(-float(_of(log_p, y).mean()), float((mean - _of(z, y)).mean()), float(spread.mean()))


def _of(z: Tensor, y: Tensor) -> Tensor:
    return z.gather(-1, y[:, None])[:, 0]


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) in float64 and (N,)."""
    if logits.ndim != labels.ndim + 1 or logits.shape[:-1] != labels.shape or not labels.numel():
        raise DataError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}",
            remedy="give (..., K) and (...), with at least one label",
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"labels of type {labels.dtype}", remedy="give whole numbers")
    z, y = logits.detach().double().flatten(0, -2), labels.detach().flatten().long()
    if int(y.min()) < 0 or int(y.max()) >= z.shape[-1]:
        raise DataError(
            f"a label of {int(y.min())} or {int(y.max())} among {z.shape[-1]} classes",
            remedy="leave padding (-100) out before",
        )
    if bool((z.isnan() | (z == math.inf)).any()) or bool(_of(z, y).isinf().any()):
        raise DataError("a logit that is NaN or +inf, or a label whose logit is −inf", remedy="look at the model")
    return z, y
