"""A compiled step of one row, whose products with a vector take in what stands beside them: the RMS norm before a product,
the gate over its halves, the sum with the residual stream. And they read their weights early: no step writes any.

Works on the graph that torch.compile has traced, before anything is lowered: there a norm is its formula and a gate its
activation. What does not match is left as it is, to the compiler.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

Found = tuple[fx.Node, fx.Node, float]
_GATES: Mapping[Callable[..., Any], str] = {F.silu: "silu", F.relu: "relu", torch.sigmoid: "sigmoid"}


def take_in(graph: fx.GraphModule) -> int:
    """Rewrites `graph`; how many norms, gates and sums it took in."""
    from dovetail.kernels.linear import vector

    taken = 0
    for node in [n for n in graph.graph.nodes if n.target is vector.step.op]:
        flat, weight, *others = node.args
        shaped = _only_user(node)
        node.args = (*node.args[:-1], True)
        if any(others) or not _calls(flat, "reshape") or not _calls(shaped, "view"):
            continue
        last, x, more = shaped, flat.args[0], [None, 0.0, None, None]
        if (norm := _normed(x, weight)) is not None:
            x, *more[:2] = norm
        if (gated := _gated(shaped)) is not None:
            last, more[2] = gated
        elif (sum_ := _added(shaped, weight)) is not None:
            last, residual = sum_
            with graph.graph.inserting_before(last):
                more[3] = graph.graph.call_method("reshape", (residual, -1))
        if more == [None, 0.0, None, None]:
            continue
        taken += sum(m is not None for m in (more[0], *more[2:]))
        with graph.graph.inserting_before(last):
            given = graph.graph.call_method("reshape", (x, -1))
            made = graph.graph.call_function(vector.step.op, (given, weight, *more, True))
            out = graph.graph.call_method("view", (made, *shaped.args[1:]))
        out.meta = dict(last.meta)
        last.replace_all_uses_with(out)
        _erase(last, kept=(given, made))
    graph.recompile()
    return taken


def _erase(node: fx.Node, kept: tuple[fx.Node, ...]) -> None:
    """`node`, and what nobody reads without it: of what is matched, nothing writes. (Others may, such as state.add_.)"""
    if node.users or node.op == "placeholder" or node in kept:
        return
    given = node.all_input_nodes
    node.graph.erase_node(node)
    for each in given:
        _erase(each, kept)


def _normed(n: Any, product: fx.Node) -> Found | None:
    """(x, weight, eps) of n = weight · (x / √(mean x² + eps)), computed wide and rounded."""
    for weight, rounded in (_pair(n, operator.mul), _pair(n, operator.mul)[::-1]):
        if not (_calls(rounded, "to") and _like(weight, product) and weight.op == "placeholder"):
            continue
        for wide, root in (_pair(rounded.args[0], operator.mul), _pair(rounded.args[0], operator.mul)[::-1]):
            if not _is(root, torch.rsqrt) or not _calls(wide, "to"):
                continue
            mean, eps = _pair(root.args[0], operator.add)
            if not _calls(mean, "mean") or not isinstance(eps, float) or mean.args[1:] != (-1,):
                continue
            square, x = mean.args[0], wide.args[0]
            if _calls(square, "square") and square.args[0] is wide and wide.args[1:] == (torch.float32,):
                return (x, weight, eps) if _like(x, product) else None
    return None


def _gated(shaped: fx.Node) -> tuple[fx.Node, str] | None:
    """(act(g) · u, the name of act) where nothing else reads g|u."""
    halves = _only_user(shaped)
    if not _calls(halves, "chunk") or halves.args[1:] != (2,) or halves.kwargs.get("dim") != -1:
        return None
    parts = {user.args[1]: user for user in halves.users if _is(user, operator.getitem)}
    act, product = (_only_user(parts.get(i)) for i in (0, 1))
    if (
        len(halves.users) != 2
        or act is None
        or act.target not in _GATES
        or act.kwargs
        or _only_user(act) is not product
    ):
        return None
    if not _is(product, operator.mul) or {*product.args} != {act, parts[1]}:
        return None
    return product, _GATES[act.target]


def _added(shaped: fx.Node, product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(sum, what is added) where nothing else reads the product."""
    total = _only_user(shaped)
    one, two = _pair(total, operator.add)
    other = two if one is shaped else one
    if total is None or other is shaped or not isinstance(other, fx.Node) or not _like(other, product):
        return None
    return (total, other) if _value(other).shape == _value(shaped).shape else None


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _like(node: Any, product: fx.Node) -> bool:
    """A tensor in the type of the product's weight."""
    one, two = _value(node), _value(product)
    return isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) and one.dtype == two.dtype


def _pair(node: Any, target: Any) -> tuple[Any, Any]:
    fits = _is(node, target) and len(node.args) == 2
    return node.args if fits else (None, None)


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _calls(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target == name


def _only_user(node: Any) -> Any:
    return next(iter(node.users)) if isinstance(node, fx.Node) and len(node.users) == 1 else None
