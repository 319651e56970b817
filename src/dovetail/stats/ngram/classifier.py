"""Logistic regression on feature vectors: the linear classifier that stands on n-grams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import DataError, RunError, UserError


class LogisticRegression:
    """p(class | x) = softmax(x W + b), by L-BFGS on the mean of -log p plus l2 / 2 ‖W‖² (the bias is free).

    classes: labels in sorted order. weight: (F, K), bias: (K,), float64. l2 = 1 / (C · rows) gives scikit-learn's C.
    """

    def __init__(self, classes: Sequence[Any], weight: Tensor, bias: Tensor):
        self.classes, self.weight, self.bias = list(classes), weight, bias

    @staticmethod
    def fit(
        features: Tensor, labels: Sequence[Any], *, l2: float = 1e-4, steps: int = 500, tolerance: float = 1e-7
    ) -> LogisticRegression:
        """features: (N, F), sparse CSR or dense. labels: N of any sortable sort. steps: at most so many.

        tolerance: largest element of the gradient at the end. Raises DataError for labels that do not fit, RunError
        where the tolerance is not reached.
        """
        if l2 <= 0:
            raise UserError(f"l2 = {l2}", remedy="give something above 0: separable classes have no finite solution")
        if features.dim() != 2 or features.shape[0] != len(labels):
            raise DataError(f"{len(labels)} labels for features of shape {tuple(features.shape)}")
        classes = sorted(set(labels))
        if len(classes) < 2:
            raise DataError(f"{len(classes)} class to tell apart", remedy="give examples of two or more")
        place = {label: i for i, label in enumerate(classes)}
        y = torch.tensor([place[label] for label in labels], device=features.device)
        x, across = features.double(), features.double().t()
        across = across.to_sparse_csr() if features.layout == torch.sparse_csr else across
        w = torch.zeros(features.shape[1] + 1, len(classes), dtype=torch.float64, device=features.device)
        optimiser = torch.optim.LBFGS(
            [w], max_iter=steps, max_eval=2 * steps, tolerance_grad=tolerance, tolerance_change=0,
            history_size=20, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            logp = torch.log_softmax(x @ w[:-1] + w[-1], -1)
            error = logp.exp()
            error[torch.arange(len(y)), y] -= 1
            error /= len(y)
            w.grad = torch.cat([across @ error + l2 * w[:-1], error.sum(0)[None]])
            return -logp.gather(1, y[:, None]).mean() + l2 / 2 * w[:-1].square().sum()

        optimiser.step(loss)
        loss()
        assert w.grad is not None
        if not float(w.grad.abs().max()) <= 100 * tolerance:
            raise RunError(
                f"logistic regression stopped at a gradient of {float(w.grad.abs().max()):.1e}",
                remedy="give more steps, a larger l2 or features of smaller scale",
            )
        return LogisticRegression(classes, w[:-1].clone(), w[-1].clone())

    def log_probabilities(self, features: Tensor) -> Tensor:
        """log p of each class: (N, F) -> (N, K), float64."""
        return torch.log_softmax(features.double() @ self.weight + self.bias, -1)

    def predict(self, features: Tensor) -> list[Any]:
        """The likeliest class of each row."""
        return [self.classes[i] for i in self.log_probabilities(features).argmax(-1).tolist()]
