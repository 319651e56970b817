"""Non-maximum suppression of boxes: greedy, soft, and by matrix; all can keep classes (or images) apart.

Overlaps are compared in float64, scores that tie keep the order in which they were given, and `classes` is compared
itself: no offset is added to coordinates, which would cost their last digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dovetail.errors import DataError, UserError
from dovetail.geometry.boxes import box_iou, checked_boxes

BLOCK, KEPT = 512, 2048  # boxes decided at once, and earlier ones that they meet at once: bounds the memory


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, classes: Tensor | None = None) -> Tensor:
    """Indices of the boxes that greedy suppression keeps, by falling score.

    The best box is kept and what overlaps it with IoU > iou_threshold is dropped, then the best of the rest, and so on.
    boxes (N, 4) xyxy, scores (N,), classes (N,) whole numbers or None -> (K,) int64. Boxes of unlike class never
    suppress each other. Decided by blocks: inside one, the fixed point of "nobody kept above me overlaps me", which is
    the greedy answer (Zheng et al. 2021, Cluster-NMS, proposition 1).

    Raises DataError for wrong shapes, NaN or a negative size, UserError for a threshold outside [0, 1].
    Source: Neubeck and Van Gool 2006.
    """
    boxes, scores = detections(boxes, scores, classes, "xyxy", "nms")
    threshold = fraction(iou_threshold, "iou_threshold", "nms")
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order].double()
    ordered = None if classes is None else classes[order]

    def suppresses(above: Tensor, below: Tensor) -> Tensor:
        hit = box_iou(boxes[above], boxes[below]) > threshold
        return hit if ordered is None else hit & (ordered[above, None] == ordered[below])

    return order[greedy(len(order), suppresses, boxes.device)]


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    sigma: float | None = None,
    iou_threshold: float | None = None,
    min_score: float = 1e-3,
    classes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS: overlap lowers a score in place of dropping the box. Returns (indices, new scores), by falling new score.

    After each box taken, every score left is multiplied by exp(-IoU²/sigma) (give `sigma`; the paper has 0.5), or, where
    IoU > iou_threshold, by 1 - IoU (give `iou_threshold`; the paper has 0.3). Ends when no score left exceeds
    `min_score`. boxes (N, 4) xyxy, scores (N,) not negative, classes (N,) or None -> (K,) int64, (K,) of scores' dtype.
    One step a box taken, N IoUs each.

    Raises UserError unless exactly one of sigma and iou_threshold is given; else as `nms`.
    Source: Bodla et al. 2017, figure 2, equations 2 and 3.
    """
    where = "soft_nms"
    boxes, scores = detections(boxes, scores, classes, "xyxy", where, positive=True)
    if (sigma is None) == (iou_threshold is None):
        raise UserError(
            f"sigma={sigma} and iou_threshold={iou_threshold}: exactly one says how scores decay",
            where=where,
            remedy="sigma=0.5 for the Gaussian decay, or iou_threshold=0.3 for the linear one",
        )
    width = None if sigma is None else _positive(sigma, where)
    threshold = 1.0 if iou_threshold is None else fraction(iou_threshold, "iou_threshold", where)
    work, boxes = scores.double(), boxes.double()
    left = torch.ones_like(scores, dtype=torch.bool)
    taken: list[Tensor] = []
    values: list[Tensor] = []
    for _ in range(len(scores)):
        best = torch.where(left, work, -1).argmax()
        if not work[best] > min_score or not left[best]:
            break
        taken.append(best)
        values.append(work[best])
        left[best] = False
        iou = box_iou(boxes[best][None], boxes)[0]
        if width is not None:
            decay = torch.exp(-iou.square() / width)
        else:
            decay = torch.where(iou > threshold, 1 - iou, 1)
        if classes is not None:
            decay = torch.where(classes == classes[best], decay, 1)
        work = work * decay
    if not taken:
        return scores.new_zeros(0, dtype=torch.long), scores.new_zeros(0)
    return torch.stack(taken), torch.stack(values).to(scores.dtype)


def matrix_nms(overlaps: Tensor, scores: Tensor, *, sigma: float | None = 0.5, classes: Tensor | None = None) -> Tensor:
    """Matrix NMS: the scores, each lowered by min over i with s_i > s_j of f(IoU_ij) / f(max over k above i of IoU_ki).

    f(u) = exp(-u²/sigma), or 1 - u when sigma is None. overlaps (..., N, N) are IoUs of boxes, rotated boxes or masks;
    scores (..., N) not negative, classes (..., N) or None -> (..., N) in the given order and the dtype of scores.
    No box waits for another: one pass over the matrix, which is why it suits GPUs.

    Raises DataError for wrong shapes, overlaps outside [0, 1] or scores that are negative or not finite.
    Tolerance: 1e-12 against the formula. Source: Wang et al. 2020 (SOLOv2), section 3.3.
    """
    where = "matrix_nms"
    count = scores.shape[-1] if scores.ndim else 0
    if not scores.ndim or overlaps.shape != (*scores.shape, count):
        raise DataError(
            f"overlaps {tuple(overlaps.shape)} and scores {tuple(scores.shape)} do not fit",
            where=where,
            remedy="overlaps (..., N, N), as box_iou(boxes, boxes), rotated_iou or mask_iou give them; scores (..., N)",
        )
    _check_scores(scores, classes, tuple(scores.shape), where, positive=True)
    if not ((overlaps >= 0) & (overlaps <= 1)).all():
        raise DataError("an overlap is outside [0, 1]", where=where, remedy="give IoUs, not GIoUs or areas")
    width = None if sigma is None else _positive(sigma, where)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    iou = overlaps.double().take_along_dim(order[..., :, None], -2).take_along_dim(order[..., None, :], -1).triu(1)
    if classes is not None:
        kinds = classes.take_along_dim(order, -1)
        iou = iou * (kinds[..., :, None] == kinds[..., None, :])
    if not count:
        return scores.clone()
    worst = iou.amax(-2)[..., :, None]  # of i with those above it
    if width is not None:
        decay = torch.exp((worst.square() - iou.square()) / width)
    else:  # i equal to one above: that one says the same of j, without 0 / 0
        decay = torch.where(worst < 1, (1 - iou) / (1 - worst).clamp(min=torch.finfo(iou.dtype).tiny), math.inf)
    lowered = scores.double().take_along_dim(order, -1) * decay.amin(-2).clamp(max=1)
    return torch.empty_like(lowered).scatter_(-1, order, lowered).to(scores.dtype)


def greedy(count: int, suppresses: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> Tensor:
    """Ranks that greedy suppression keeps, rising, of `count` ranked from the best; `suppresses(i (n,), j (m,))`
    -> bool (n, m) says where rank i, if kept, drops rank j, and is read where i < j only."""
    kept = torch.empty(0, dtype=torch.long, device=device)
    for start in range(0, count, BLOCK):
        alive = torch.arange(start, min(start + BLOCK, count), device=device)
        for above in kept.split(KEPT):
            alive = alive[~suppresses(above, alive).any(0)]
        inside = suppresses(alive, alive).triu(1)
        keep = torch.ones_like(alive, dtype=torch.bool)
        while True:  # each round settles one more rank at least, in practice many
            again = ~(inside & keep[:, None]).any(0)
            if torch.equal(again, keep):
                break
            keep = again
        kept = torch.cat([kept, alive[keep]])
    return kept


def detections(
    boxes: Tensor, scores: Tensor, classes: Tensor | None, form: str, where: str, positive: bool = False
) -> tuple[Tensor, Tensor]:
    """Checked (N, 4 or 5) boxes and (N,) scores, without gradient. Raises DataError."""
    boxes = checked_boxes(boxes, form, where).detach()
    if boxes.ndim != 2:
        raise DataError(
            f"boxes must be (N, {boxes.shape[-1]}), not {tuple(boxes.shape)}",
            where=where,
            remedy="flatten the batch, and give the image's number (or image and class as one number) as classes",
        )
    _check_scores(scores, classes, (len(boxes),), where, positive)
    return boxes, scores.detach()


def fraction(value: float, name: str, where: str) -> float:
    """A threshold in [0, 1]. Raises UserError."""
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}", where=where, remedy="give a share between 0 and 1, such as 0.5")
    return float(value)


def _positive(sigma: float, where: str) -> float:
    if not 0 < sigma < math.inf:
        raise UserError(f"sigma is {sigma}", where=where, remedy="give a positive number, such as 0.5")
    return float(sigma)


def _check_scores(
    scores: Tensor, classes: Tensor | None, shape: tuple[int, ...], where: str, positive: bool = False
) -> None:
    if tuple(scores.shape) != shape or not scores.is_floating_point():
        raise DataError(
            f"scores must be floating point of shape {shape}, not {scores.dtype} {tuple(scores.shape)}",
            where=where,
            remedy="give one score a box",
        )
    if not scores.isfinite().all() or (positive and (scores < 0).any()):
        raise DataError(
            f"scores must be finite{' and not negative' if positive else ''}",
            where=where,
            remedy="give probabilities (sigmoid or softmax of the logits)",
        )
    if classes is not None and (tuple(classes.shape) != shape or classes.is_floating_point() or classes.is_complex()):
        raise DataError(
            f"classes must be whole numbers of shape {shape}, not {classes.dtype} {tuple(classes.shape)}",
            where=where,
            remedy="give one class a box (argmax of the class scores), or None",
        )
