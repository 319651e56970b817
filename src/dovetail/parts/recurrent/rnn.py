"""LSTM and GRU as mixers: torch's fused recurrences, reset at document borders and blind to padding.

Rows that are padded or packed are cut into their documents, which run side by side as one packed
batch and are put back: exact, and without a loop over time. The number of documents is data, so that
path waits for the device; plain rows do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.errors import BuildError
from dovetail.parts.context import Context, refuse_memory
from dovetail.parts.recurrent.borders import cut
from dovetail.parts.state import Room, VectorState
from dovetail.parts.weights import Linear, Rng
from dovetail.spec import Slot, Spec, register
from dovetail.spec.ranges import Count


class Recurrent(Spec):
    """Base of the two.

    hidden: width of the recurrence; the stream's width unless given. bidirectional: a second recurrence runs
    backwards (encoders only). bias: torch keeps two of them, and so does this. Where hidden, times two if
    bidirectional, is not the stream's width, a linear map `out` follows. The start is torch.nn's: uniform within
    1/sqrt(hidden), whatever the model's init says, which rules `out` alone.
    """

    hidden: Count | None = None
    bidirectional: bool = False
    bias: bool = True


@register(
    "mixer",
    "lstm",
    oracle="torch.nn.LSTM",
    source="Hochreiter and Schmidhuber 1997; Gers et al. 2000 (forget gate)",
    causal=True,
    bidirectional=True,
    cross=False,
)
class Lstm(Recurrent):
    """c = f·c + i·g, h = o·tanh c, gates i, f, g, o from x and the last h.

    forget_bias: start of the forget gate's bias (1 in Jozefowicz et al. 2015, section 2.2); torch.nn's start
    unless given.
    """

    forget_bias: float | None = None

    def build(self, slot: Slot) -> nn.Module:
        if self.forget_bias is not None and not self.bias:
            raise BuildError(
                "an LSTM without biases has no forget bias", where=slot.path, remedy="leave forget_bias out"
            )
        return RecurrentModule(self, slot, "LSTM", self.forget_bias)


@register(
    "mixer",
    "gru",
    oracle="torch.nn.GRU",
    source="Cho et al. 2014, eq. 5-8 (reset gate after the product, as cuDNN)",
    causal=True,
    bidirectional=True,
    cross=False,
)
class Gru(Recurrent):
    """h = (1 - z)·n + z·h, n = tanh(W x + b + r·(U h + b')), gates r, z from x and the last h."""

    def build(self, slot: Slot) -> nn.Module:
        return RecurrentModule(self, slot, "GRU", None)


class RecurrentModule(nn.RNNBase):
    """Weights under torch.nn's names (weight_ih_l0, ...), so that a torch.nn state dict loads as it is."""

    def __init__(self, spec: Recurrent, slot: Slot, mode: str, forget_bias: float | None):
        if slot.memory_dim is not None:
            raise BuildError(
                f"{spec.kind} cannot read an encoder's output", where=slot.path, remedy="use a mixer with cross=True"
            )
        if spec.bidirectional and slot.causal:
            raise BuildError(
                f"a bidirectional {spec.kind} sees the future, and this place is causal",
                where=slot.path,
                remedy="leave bidirectional out; it is for encoders",
            )
        hidden = spec.hidden or slot.dim
        super().__init__(mode, slot.dim, hidden, bias=spec.bias, batch_first=True, bidirectional=spec.bidirectional)
        self.path, self.forget_bias = slot.path, forget_bias
        self.names = ("h", "c") if mode == "LSTM" else ("h",)
        width = hidden * (2 if spec.bidirectional else 1)
        self.out = None if width == slot.width_out else Linear(width, slot.width_out, slot=slot, role="residual")

    def reset_parameters(self) -> None:
        """Nothing: `initialise` draws the start once the model stands."""

    def initialise(self, rng: Rng) -> None:
        bound = self.hidden_size**-0.5
        for name, weight in self.named_parameters(recurse=False):
            weight.uniform_(-bound, bound, generator=rng(name))
            if self.forget_bias is not None and name.startswith("bias"):
                gate = weight[self.hidden_size : 2 * self.hidden_size]
                gate.fill_(self.forget_bias if name.startswith("bias_ih") else 0.0)

    def new_state(self, room: Room) -> VectorState:
        """h, and c of an LSTM, each (B,hidden)."""
        if self.bidirectional:
            raise BuildError(
                "a bidirectional recurrence cannot decode step by step",
                where=self.path,
                remedy="leave bidirectional out, or run it without a state",
            )
        sizes = (room.batch, self.hidden_size)
        return VectorState(**{name: torch.zeros(sizes, dtype=room.dtype, device=room.device) for name in self.names})

    def forward(
        self,
        x: Tensor,
        ctx: Context,
        state: VectorState | None = None,
        *,
        keys: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """x (B,T,C) -> (B,T,C'). Each document starts from zero (or from `state`); padding gives zero."""
        refuse_memory(keys, values, self.path)
        if ctx.segments is None:
            start = [
                x.new_zeros(self._start(x.shape[0])) if state is None else self._held(state, n) for n in self.names
            ]
            y, *last = self._run(x, None, start)
            if state is not None:
                state.update(**{name: t[0] for name, t in zip(self.names, last, strict=True)})
        else:
            y = self._documents(x, ctx, state)
        return y if self.out is None else self.out(y)

    def _documents(self, x: Tensor, ctx: Context, state: VectorState | None) -> Tensor:
        segments = ctx.segments
        assert segments is not None
        cut: Cut = ctx.once("documents", lambda: Cut.of(segments.expand(x.shape[:2])))
        y = x.new_zeros(*x.shape[:2], self.hidden_size * (2 if self.bidirectional else 1))
        if not cut.alive:
            return y
        start = [
            x.new_zeros(self._start(len(cut.row))) if state is None else self._held(state, n)[:, cut.row]
            for n in self.names
        ]
        real, *last = self._run(x.flatten(0, 1)[cut.token], cut.alive_at, start)
        if state is not None:
            new = {n: state[n].index_copy(0, cut.row, t[0].to(state[n].dtype)) for n, t in zip(self.names, last)}
            state.update(**new)
        return y.flatten(0, 1).index_copy(0, cut.token, real).view_as(y)

    def _run(self, x: Tensor, alive: Tensor | None, start: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Rows (B,T,C), or packed data (N,C) with `alive` documents at each time; start (1|2,B,hidden) each."""
        longest = x.shape[1] if alive is None else len(alive)
        most = _LONGEST.get(x.device.type, longest)
        if longest <= most:
            return self._fused(x, alive, start)
        if self.bidirectional:  # torch's own cells, step by step
            with torch.backends.cudnn.flags(enabled=False):
                return self._fused(x, alive, start)
        outs, last, read = [], tuple(start), 0
        for begin in range(0, longest, most):
            left = None if alive is None else alive[begin : begin + most]
            if left is None:
                piece, still = x[:, begin : begin + most], last
            else:  # documents that have ended are the last ones
                piece, still = x[read : read + int(left.sum())], tuple(s[:, : left[0]].contiguous() for s in last)
                read += len(piece)
            y, *new = self._fused(piece, left, still)
            last = tuple(torch.cat([now, old[:, now.shape[1] :]], 1) for now, old in zip(new, last, strict=True))
            outs.append(y)
        return torch.cat(outs, 1 if alive is None else 0), *last

    def _fused(self, x: Tensor, alive: Tensor | None, start: Sequence[Tensor]) -> tuple[Tensor, ...]:
        weights: Any = [getattr(self, name) for names in self._all_weights for name in names]
        how = (weights, self.bias, 1, 0.0, self.training, self.bidirectional)
        begin: Any = tuple(start) if self.mode == "LSTM" else start[0]
        fused: Any = torch.lstm if self.mode == "LSTM" else torch.gru
        return fused(x, begin, *how, True) if alive is None else fused(x, alive, begin, *how)

    def _held(self, state: VectorState, name: str) -> Tensor:
        """(1,B,hidden), in the weights' dtype: what is fused takes no other."""
        weight: Any = self.weight_ih_l0
        return state[name][None].to(weight.dtype)

    def _start(self, rows: int) -> tuple[int, int, int]:
        return (2 if self.bidirectional else 1, rows, self.hidden_size)


# Tokens of a row that a library's recurrence takes at once; cuDNN's counts no further (pytorch issue 133751).
_LONGEST = {"cuda": 65_535}


@dataclass(frozen=True)
class Cut:
    """How padded or packed rows fall into documents, longest document first.

    token (N,): flat indices of the real tokens in time-major order, as packed sequences want them. alive_at
    (longest,): how many documents reach each time, on the host. row (documents,): the row each stands in.
    """

    token: Tensor
    alive_at: Tensor
    row: Tensor
    alive: bool

    @staticmethod
    def of(segments: Tensor) -> Cut:
        """segments (B,T): document numbers, negative for padding. Padding inside a document is skipped."""
        real, document, first = cut(segments)
        time = torch.arange(len(real), device=real.device) - first[document]
        ranked = torch.bincount(document).argsort(descending=True, stable=True)
        rank = ranked.argsort()
        order = (time * max(1, len(first)) + rank[document]).argsort()
        return Cut(real[order], torch.bincount(time).cpu(), (real // segments.shape[1])[first][ranked], len(real) > 0)
