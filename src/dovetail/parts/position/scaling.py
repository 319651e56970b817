"""How RoPE's frequencies stretch beyond the trained length. Each scaling returns frequencies and a factor."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dovetail.errors import BuildError
from dovetail.spec import Spec, register
from dovetail.spec.ranges import Count, Positive, Share

NotNegative = Annotated[float, Field(ge=0)]


class RopeScaling(Spec):
    """Base. `original` is the trained length; the model's context unless given."""

    needs_length: ClassVar[bool] = False
    needs_original: ClassVar[bool] = True
    moves_base: ClassVar[bool] = False  # by factor^(d/(d-2)): there must be more than one frequency
    factor: Positive = 1.0
    original: Count | None = None

    def trained(self, context: int | None) -> int:
        found = self.original or context
        assert found is not None
        return found

    def check(self, context: int | None, dim: int, path: str) -> None:
        """Raises BuildError when the scaling lacks something that it needs."""
        if self.factor < 1:
            raise BuildError(
                f"a rope scaling factor of {self.factor}", where=path, remedy="give a factor of at least 1"
            )
        if self.moves_base and dim < 4:
            raise BuildError(
                f"{self.kind} on a single frequency: it keeps the fastest and stretches the others",
                where=path,
                remedy="turn at least 4 entries of a head, or use {kind: linear}",
            )
        if self.needs_original and not (self.original or context):
            raise BuildError(
                f"{self.kind} needs the trained length", where=path, remedy="give original, or the model's context"
            )

    def frequencies(
        self, dim: int, theta: float, context: int | None, length: Tensor | None, device: torch.device
    ) -> tuple[Tensor, float]:
        """(inverse frequencies (dim/2,) fp32, factor on cos and sin).

        length (B,1,1): tokens in play in each row, where needed; the frequencies are then (B,1,dim/2).
        """
        raise TypeError(f"{self.kind} does not say its frequencies")


def _exponents(dim: int, device: torch.device) -> Tensor:
    return torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim


@register(
    "rope_scaling",
    "linear",
    oracle="transformers.modeling_rope_utils",
    source="Chen et al. 2023 (position interpolation); kaiokendev",
)
class LinearScaling(RopeScaling):
    """Position interpolation: every frequency divided by `factor`."""

    needs_original: ClassVar[bool] = False

    def frequencies(
        self, dim: int, theta: float, context: int | None, length: Tensor | None, device: torch.device
    ) -> tuple[Tensor, float]:
        return 1.0 / theta ** _exponents(dim, device) / self.factor, 1.0


@register("rope_scaling", "ntk", oracle="formula: theta·factor^(d/(d-2))", source="bloc97 2023 (NTK-aware scaled RoPE)")
class NtkScaling(RopeScaling):
    """NTK by base: theta becomes theta·factor^(d/(d-2)), so the lowest frequency is divided by `factor`.

    The "NTK-RoPE-old" of kexue.fm/archives/9706 takes theta·factor instead, which divides the lowest frequency by
    factor^((d-2)/d): a rope of that theta, without a scaling.
    """

    needs_original: ClassVar[bool] = False
    moves_base: ClassVar[bool] = True

    def frequencies(
        self, dim: int, theta: float, context: int | None, length: Tensor | None, device: torch.device
    ) -> tuple[Tensor, float]:
        return 1.0 / (theta * self.factor ** (dim / (dim - 2))) ** _exponents(dim, device), 1.0


@register(
    "rope_scaling",
    "ntk_fixed",
    oracle="formula: mixed-radix digits; author's ntk_patch (bojone/rerope)",
    source="Su 2023, kexue.fm/archives/9706, eq. 6 (NTK-RoPE-fixed)",
)
class NtkFixed(RopeScaling):
    """Positions as digits of a base grown by factor^(2/d): frequency m of d/2 is divided by factor^(2m/d), m from 1.

    So the slowest is divided by `factor`, and the fastest a little too: a digit of a larger base has a longer period.
    """

    needs_original: ClassVar[bool] = False

    def frequencies(
        self, dim: int, theta: float, context: int | None, length: Tensor | None, device: torch.device
    ) -> tuple[Tensor, float]:
        return 1.0 / theta ** _exponents(dim, device) / _spread(dim, self.factor, 1.0, device), 1.0


@register(
    "rope_scaling",
    "ntk_mixed",
    oracle="formula: mixed-radix digits; author's ntk_patch (bojone/rerope)",
    source="Su 2023, kexue.fm/archives/9706, eq. 9-12 (NTK-RoPE-mixed)",
)
class NtkMixed(RopeScaling):
    """Digits of several bases: frequency m is divided by exp(a·m^b), a = ln(factor)/(d/2)^b, m from 1 to d/2.

    Fast frequencies, which are trained best, take more of the stretch than under ntk_fixed, which is b = 1; b = 0
    would be linear. 0.625 was best for the source's model of 100 M parameters, 0.75 is what its code has for LLaMA 2.
    """

    needs_original: ClassVar[bool] = False
    b: Share = 0.625

    def frequencies(
        self, dim: int, theta: float, context: int | None, length: Tensor | None, device: torch.device
    ) -> tuple[Tensor, float]:
        return 1.0 / theta ** _exponents(dim, device) / _spread(dim, self.factor, self.b, device), 1.0


def _spread(dim: int, factor: float, b: float, device: torch.device) -> Tensor:
    """factor^((m/(dim/2))^b) for m = 1..dim/2: how much of `factor` has been reached at each frequency."""
    m = torch.arange(1, dim // 2 + 1, device=device, dtype=torch.float32)
    return factor ** ((m / (dim // 2)) ** b)


@register(
    "rope_scaling",
    "dynamic",
    oracle="transformers.modeling_rope_utils",
    source="emozilla 2023 (dynamic NTK)",
    decode="approximate: the base grows with the longest position in play, so earlier outputs were made with another base",
)
class DynamicScaling(RopeScaling):
    """NTK by base with a factor that grows with the length in play; plain RoPE up to the trained length."""

    needs_length: ClassVar[bool] = True
    moves_base: ClassVar[bool] = True

    def frequencies(
        self, dim: int, theta: float, context: int | None, length: Tensor | None, device: torch.device
    ) -> tuple[Tensor, float]:
        original = self.trained(context)
        assert length is not None
        ratio = length.clamp_min(original).float() / original
        base = theta * (self.factor * ratio - (self.factor - 1)) ** (dim / (dim - 2))
        return 1.0 / base ** _exponents(dim, device), 1.0


@register(
    "rope_scaling", "yarn", oracle="transformers.modeling_rope_utils", source="Peng et al. 2023 (YaRN), eq. 14-22"
)
class YarnScaling(RopeScaling):
    """Slow frequencies interpolated, fast ones kept, a ramp between; cos and sin times 0.1·ln(factor) + 1.

    attention_factor: replaces that factor. mscale, mscale_all_dim: DeepSeek's two-part form of it.
    truncate: round the ramp's ends to whole dimensions.
    """

    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None
    mscale: NotNegative | None = None
    mscale_all_dim: NotNegative | None = None
    truncate: bool = True

    def frequencies(
        self, dim: int, theta: float, context: int | None, length: Tensor | None, device: torch.device
    ) -> tuple[Tensor, float]:
        original = self.trained(context)

        def crossing(turns: float) -> float:
            return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = crossing(self.beta_fast), crossing(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high = high + 0.001 if low == high else high
        ramp = ((torch.arange(dim // 2, device=device, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        kept = 1.0 / theta ** _exponents(dim, device)
        return kept / self.factor * ramp + kept * (1 - ramp), self._attention_factor()

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def stretch(scale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return stretch(self.mscale) / stretch(self.mscale_all_dim)
        return stretch(1.0)


@register(
    "rope_scaling",
    "llama3",
    oracle="transformers.modeling_rope_utils",
    source="Meta 2024, Llama 3.1 model.py apply_scaling",
)
class Llama3Scaling(RopeScaling):
    """Waves longer than original/low are divided by `factor`, shorter than original/high kept, a ramp between."""

    factor: Positive = 8.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0

    def check(self, context: int | None, dim: int, path: str) -> None:
        super().check(context, dim, path)
        if self.high_freq_factor <= self.low_freq_factor:
            raise BuildError(
                f"llama3's ramp from {self.low_freq_factor} to {self.high_freq_factor}",
                where=path,
                remedy="give a high_freq_factor above low_freq_factor",
            )

    def frequencies(
        self, dim: int, theta: float, context: int | None, length: Tensor | None, device: torch.device
    ) -> tuple[Tensor, float]:
        original = self.trained(context)
        inverse = 1.0 / theta ** _exponents(dim, device)
        wave = 2 * math.pi / inverse
        low, high = self.low_freq_factor, self.high_freq_factor
        smooth = (original / wave - low) / (high - low)
        between = (1 - smooth) * inverse / self.factor + smooth * inverse
        scaled = torch.where(wave > original / low, inverse / self.factor, inverse)
        inside = (wave <= original / low) & (wave >= original / high)
        return torch.where(inside, between, scaled), 1.0


@register(
    "rope_scaling",
    "longrope",
    oracle="transformers.modeling_rope_utils",
    source="Ding et al. 2024 (LongRoPE), eq. 3",
    decode="approximate: short and long factors switch where the sequence passes the trained length",
)
class LongRope(RopeScaling):
    """A searched factor for every frequency: one list up to the trained length, another beyond it.

    attention_factor: on cos and sin; sqrt(1 + ln(factor)/ln(original)) unless given.
    """

    needs_length: ClassVar[bool] = True
    short_factor: tuple[Positive, ...]
    long_factor: tuple[Positive, ...]
    attention_factor: Positive | None = None

    def check(self, context: int | None, dim: int, path: str) -> None:
        super().check(context, dim, path)
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != dim // 2:
                raise BuildError(
                    f"longrope's {name} has {len(getattr(self, name))} entries", where=path, remedy=f"give {dim // 2}"
                )

    def frequencies(
        self, dim: int, theta: float, context: int | None, length: Tensor | None, device: torch.device
    ) -> tuple[Tensor, float]:
        original = self.trained(context)
        assert length is not None
        short, long = (
            torch.tensor(f, device=device, dtype=torch.float32) for f in (self.short_factor, self.long_factor)
        )
        stretch = torch.where(length > original, long, short)
        factor = self.attention_factor
        if factor is None:
            factor = 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(original))
        return 1.0 / (stretch * theta ** _exponents(dim, device)), factor
