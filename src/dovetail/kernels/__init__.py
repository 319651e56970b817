"""Operations: one folder each, with a plain reference beside every fast path, and a plan that chooses."""

from dovetail.kernels.assembler import take_later

take_later()
