"""Surgery: weights carried from one arrangement to another by registered maps. Pure: nothing is trained here."""

from dovetail.surgery.maps import Mapped, weight_map
from dovetail.surgery.transplant import Move, Transplant, transplant

__all__ = ["Mapped", "Move", "Transplant", "transplant", "weight_map"]
