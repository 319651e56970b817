"""A kernel as one operation of torch's, which compilers, fake tensors and autograd see whole.

As torch.library.custom_op makes it, and used the same way, but at about a third of its time on the host, which is what
a launch of short kernels waits for: no lists of arguments are made again and no schemas read in a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("dovetail", "FRAGMENT")


def operation(name: str) -> Callable[[Callable[..., Any]], Operation]:
    """Makes torch.ops.dovetail.NAME of a function of tensors and numbers, which changes none of what it is given.

    Its annotations are its schema, so that no argument has a default; what it returns is new.
    """
    return lambda run: Operation(name, run)


class Operation:
    """What `operation` makes. `op`: torch's own object, for torch.library.opcheck."""

    def __init__(self, name: str, run: Callable[..., Any]):
        schema = torch.library.infer_schema(run, mutates_args=())
        _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, torch._disable_dynamo(run), "CompositeExplicitAutograd")
        _LIBRARY.impl(name, self._followed, "Autograd")
        self.op = getattr(torch.ops.dovetail, name).default
        assert not any(a.has_default_value() for a in self.op._schema.arguments), "torch leaves out what is a default"
        self._rule = _rule(self.op, self._refuse, lambda ctx, inputs, output: None)

    def __call__(self, *args: Any) -> Any:
        return self.op(*args)

    def register_fake(self, shapes: Callable[..., Any]) -> None:
        """shapes: of the same arguments, empty tensors as the operation would return them."""
        torch.library.register_fake(self.op, shapes, lib=_LIBRARY)

    def register_autograd(self, differentiate: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """differentiate(ctx, *gradients of what is returned): a gradient for each argument, None where it has none.
        setup_context(ctx, inputs, output): keeps what that needs. Without them a gradient is refused."""
        self._rule = _rule(self.op, differentiate, setup_context)

    def register_autocast(self, device: str, dtype: torch.dtype) -> None:
        """Under autocast on a device of that type ("cuda"), floating-point tensors but fp64 become `dtype`, and within it is
        off."""
        torch.library.register_autocast(self.op, device, dtype, lib=_LIBRARY)

    def _followed(self, *args: Any) -> Any:
        if torch.is_grad_enabled():
            return self._rule.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*args)

    def _refuse(self, ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"{self.op} is not differentiable")


def _rule(op: Any, differentiate: Callable[..., Any], keep: Callable[..., None]) -> Any:
    """What autograd follows, by the operation's name in profiles."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        keep(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    return type(op._opname, (torch.autograd.Function,), methods)
