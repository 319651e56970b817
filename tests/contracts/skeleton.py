"""What the hard cases share: a skeleton built with random weights, and the comparison with its oracle through a KeyMap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.models.keymap import Concat, KeyMap, Rename, Rule
from dovetail.parts.init import Normal
from dovetail.parts.weights import initialise
from dovetail.spec import Slot, Spec

WIDE = torch.float64
TIGHT = 1e-9  # both sides in fp64 throughout
SINGLE = 1e-5  # the oracle rounds to fp32 inside (norms, rotary tables, softmax)


def build(category: str, spec: Any, **slot: Any) -> Any:
    """The part of a spec alone, in fp64 with random weights. slot: what its place fixes (dim and so on)."""
    with torch.device("meta"):
        module = Spec.parse(category, spec).build(Slot(**({"init": Normal(std=0.2)} | slot))).to(WIDE)
    module.to_empty(device="cpu")
    initialise(module, seed=0)
    return module.eval()


def randomise(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Every parameter of an oracle drawn anew, biases, norms and tables too, so that none hides at zero or one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64) * std
            p.copy_(noise + (1.0 if p.dim() == 1 and p.mean() > 0.5 else 0.0))
    return model.to(WIDE).eval()


def keys(*pairs: tuple[str, str], kinds: Sequence[str] = ("weight",)) -> list[Rule]:
    """Renames of (stored, ours) modules, one for each kind of parameter."""
    return [Rename(f"{stored}.{kind}", f"{ours}.{kind}") for stored, ours in pairs for kind in kinds]


def joined(stored: Sequence[str], ours: str, sizes: Sequence[int], kinds: Sequence[str] = ("weight",)) -> list[Rule]:
    """Modules stored apart and fused here."""
    return [Concat(tuple(f"{s}.{kind}" for s in stored), f"{ours}.{kind}", tuple(sizes)) for kind in kinds]


def carry(theirs: nn.Module, ours: nn.Module, rules: Sequence[Rule], unused: Sequence[str] = ()) -> KeyMap:
    """Puts their weights into our module. `unused`: stored names (by prefix) outside the comparison."""
    stored = {n: p.detach() for n, p in theirs.named_parameters() if not n.startswith(tuple(unused) or ("\0",))}
    keymap = KeyMap(rules)
    loaded, _ = keymap.load(stored)
    wanted = dict(ours.named_parameters())
    assert loaded.keys() == wanted.keys(), loaded.keys() ^ wanted.keys()
    with torch.no_grad():
        for name, p in wanted.items():
            p.copy_(loaded[name])
    return keymap


def close(ours: Tensor, theirs: Tensor, tol: float, what: str, floor: float = 0.0) -> None:
    """max|Δ| <= tol · max|ref|, where max|ref| counts as at least `floor`."""
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    error, size = (ours - theirs).abs().max().item(), max(theirs.abs().max().item(), floor)
    assert error <= tol * size, f"{what}: {error:.3g} of {size:.3g}"


Run = Callable[..., Tensor]


def match(
    ours: nn.Module,
    theirs: nn.Module,
    rules: Sequence[Rule],
    run: Run,
    oracle: Run,
    inputs: Sequence[Tensor] = (),
    *,
    tol: float = TIGHT,
    unused: Sequence[str] = (),
) -> None:
    """Outputs, and gradients of inputs and of every parameter, equal under the key map.

    run and oracle take the inputs (leaves that get gradients) and return one tensor of the same shape.
    """
    keymap = carry(theirs, ours, rules, unused)
    mine = [x.detach().clone().requires_grad_() for x in inputs]
    other = [x.detach().clone().requires_grad_() for x in inputs]
    a, b = run(*mine), oracle(*other)
    assert b.abs().max() > 1e-3, "the oracle says nothing"
    close(a, b, tol, "output")
    pull = torch.randn(b.shape, generator=torch.Generator().manual_seed(2), dtype=b.dtype)
    for model in (ours, theirs):
        model.zero_grad(set_to_none=True)
    (a * pull).sum().backward()
    (b * pull).sum().backward()
    for i, (x, y) in enumerate(zip(mine, other, strict=True)):
        assert x.grad is not None and y.grad is not None
        close(x.grad, y.grad, tol, f"gradient of input {i}")
    gradients(keymap.save({n: _grad(p) for n, p in ours.named_parameters()}), theirs, tol, unused)


def gradients(found: Mapping[str, Tensor], theirs: nn.Module, tol: float, unused: Sequence[str] = ()) -> None:
    """Every parameter's gradient. Those that are zero by symmetry (a key's bias) are held to the size of the largest."""
    wanted = {n: _grad(p) for n, p in theirs.named_parameters() if not n.startswith(tuple(unused) or ("\0",))}
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    largest = max(g.abs().max().item() for g in wanted.values())
    assert sum(g.abs().max() > 1e-6 * largest for g in wanted.values()) > len(wanted) / 2
    for name, gradient in wanted.items():
        close(found[name], gradient, tol, f"gradient of {name}", floor=1e-3 * largest)


def _grad(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad
