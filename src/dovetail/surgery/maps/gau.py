"""A gated attention unit with other options, another normaliser in it, or in chunks: weights as they are, another
function."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dovetail.parts.attention.flash import Flash
from dovetail.parts.attention.gau import GatedAttentionUnit
from dovetail.spec import Spec
from dovetail.spec.paths import brief
from dovetail.surgery.maps.base import Mapped, Place, weight_map


@weight_map("normaliser", "*", "*", gives=("approximate",), source="Su 2022, kexue.fm/archives/9019")
def another(old: Spec, new: Spec, tensors: Mapping[str, Tensor], place: Place) -> Mapped:
    """Normalisers have no weights; their functions differ at every length but one, if at any."""
    return Mapped({}, "approximate", f"normaliser {brief(new)} in place of {brief(old)}: no bound")


@weight_map("mixer", "gau", "gau", gives=("approximate",), source="Hua et al. 2022 (FLASH), section 3.1")
def other_options(
    old: GatedAttentionUnit, new: GatedAttentionUnit, tensors: Mapping[str, Tensor], place: Place
) -> Mapped | None:
    """Another activation, scale or mask with the same weights. Other widths carry nothing."""
    if (old.width(place.dim), old.key_dim, old.bias) != (new.width(place.dim), new.key_dim, new.bias):
        return None
    lost = []
    if old.activation != new.activation:
        lost.append(f"{brief(new.activation)} in place of {brief(old.activation)}")
    if (old.scale or old.key_dim**-0.5) != (new.scale or new.key_dim**-0.5):
        lost.append("scores are scaled otherwise")
    if old.mask != new.mask:
        lost.append("another mask")
    return Mapped(dict(tensors), "approximate", f"{'; '.join(lost)}: no bound") if lost else None


@weight_map("mixer", "gau", "flash", gives=("approximate",), source="Hua et al. 2022 (FLASH), sections 3.1 and 3.2")
def in_chunks(old: GatedAttentionUnit, new: Flash, tensors: Mapping[str, Tensor], place: Place) -> Mapped | None:
    """The unit's maps, and its views of the base as those inside chunks. Other widths carry nothing."""
    if (old.width(place.dim), old.key_dim, old.bias) != (new.width(place.dim), new.key_dim, new.bias):
        return None
    views = {"q_affine": "quad_q", "k_affine": "quad_k"}
    carried = {}
    for name, tensor in tensors.items():
        module, _, which = name.partition(".")
        carried[f"{views.get(module, module)}.{which}"] = tensor
    words = (
        "attention inside chunks is carried, the views for that across them start anew; flash in place of gau: no bound"
    )
    return Mapped(carried, "approximate", words)
