"""Blocks as torch.compile would run them, for a step that is only counted: Inductor's partition of their graphs.

What a compiled model keeps for its backward is what the partition hands over: what products and attention read is made
once and kept, pointwise operations are made again. Of what a graph makes inside, that stands in memory which a product,
an attention or a custom operation writes or reads; the rest is fused with its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from dovetail.parts.containers import StackModule

_WHOLE = ("mm", "addmm", "bmm", "baddbmm", "convolution", "sort", "index_put", "embedding_dense_backward")
_SAME = ("view", "_unsafe_view", "t", "permute", "transpose", "expand", "slice", "select", "split", "unsqueeze", "squeeze",
         "reshape", "alias", "detach", "as_strided", "unbind", "getitem", "split_with_sizes")  # fmt: skip


@contextmanager
def partitioned(model: nn.Module, live: Any) -> Iterator[None]:
    """Inside, the blocks of `model` (fake tensors) run as partitioned graphs. live: told what stands in memory."""
    blocks = [b for m in model.modules() if isinstance(m, StackModule) for b in m.blocks]
    made: dict[Any, Any] = {}
    for block in blocks:
        block.forward = _compiled(block, live, made)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _compiled(block: Any, live: Any, made: dict[Any, Any]) -> Callable[..., Tensor]:
    from torch._functorch.aot_autograd import aot_function  # with the compiler, two seconds to import
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    plain = block.forward
    named = dict(block.named_parameters()) | dict(block.named_buffers())
    key = (block.spec, tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in named.items()))
    loose = [
        (m, n) for m in block.modules() for n, t in vars(m).items() if isinstance(t, Tensor)
    ]  # tables of positions

    def tensors(leaves: list[Any]) -> list[Tensor]:
        return [*named.values(), *(getattr(m, n) for m, n in loose), *(t for t in leaves if isinstance(t, Tensor))]

    def forward(x: Tensor, ctx: Any, state: Any = None) -> Tensor:
        leaves, like = tree_flatten(ctx)
        if key not in made:

            def run(x: Tensor, *given: Tensor) -> Tensor:
                """Every tensor is an argument, as a graph wants them."""
                before = [getattr(m, n) for m, n in loose]
                rest = iter(given[len(named) :])
                for m, n in loose:
                    setattr(m, n, next(rest))
                there = tree_unflatten([next(rest) if isinstance(t, Tensor) else t for t in leaves], like)
                block.forward = plain
                try:
                    return functional_call(block, dict(zip(named, given, strict=False)), (x, there, state))
                finally:
                    block.forward = forward
                    for (m, n), t in zip(loose, before, strict=True):
                        setattr(m, n, t)

            counted: dict[str, Any] = {"fw_compiler": _counted(live), "bw_compiler": _counted(live)}
            made[key] = aot_function(run, partition_fn=min_cut_rematerialization_partition, **counted)
            # A first call for its graphs alone: what it keeps is not for a checkpoint around this.
            with live.paused(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                made[key](x.detach().requires_grad_(x.requires_grad), *tensors(leaves))
        return made[key](x, *tensors(leaves))

    return forward


def _counted(live: Any) -> Callable[..., Any]:
    from torch._functorch.aot_autograd import make_boxed_func

    def compiler(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        beside = standing(graph)

        def run(*inputs: Any) -> Any:
            with live.paused(beside):
                out = graph(*inputs)
            if live.counting:
                live.add(out)
            return out

        return make_boxed_func(run)

    return compiler


def standing(graph: fx.GraphModule) -> int:
    """The most bytes that a partitioned graph holds more than when it began: what stands of what it makes, less what it
    was handed for it alone and has read for the last time."""
    nodes = list(graph.graph.nodes)
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        for used in node.all_input_nodes:
            last[_origin(used)] = i
    gone: dict[int, list[fx.Node]] = {}
    for node, i in last.items():
        gone.setdefault(i, []).append(node)
    now = most = 0
    for i, node in enumerate(nodes):
        if node.op == "call_function" and _origin(node) is node and _stands(node):
            now += _bytes(node)
        most = max(most, now)
        for freed in gone.get(i, ()):
            saved = freed.op == "placeholder" and not freed.name.startswith(("primals", "tangents"))
            if saved or (freed.op == "call_function" and _stands(freed)):
                now -= _bytes(freed)
    return most


def _origin(node: fx.Node) -> fx.Node:
    """The node whose memory this one is a view of; itself where it has its own."""
    while _name(node) in _SAME and node.all_input_nodes and not isinstance(_value(node.all_input_nodes[0]), tuple):
        node = node.all_input_nodes[0]
    return node


def _stands(node: fx.Node) -> bool:
    """Whether it is in memory: made or read by what is not fused, or handed on."""
    return _whole(node) or any(u.op == "output" or _whole(u) or (_name(u) in _SAME and _stands(u)) for u in node.users)


def _whole(node: fx.Node) -> bool:
    name = _name(node)
    apart = getattr(node.target, "namespace", "aten") not in ("aten", "prims") or "scaled_dot_product" in name
    return node.op == "call_function" and (name in _WHOLE or apart)


def _name(node: fx.Node) -> str:
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else getattr(node.target, "__name__", "")


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _bytes(node: fx.Node) -> int:
    values = _value(node) if isinstance(_value(node), (tuple, list)) else [_value(node)]
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
