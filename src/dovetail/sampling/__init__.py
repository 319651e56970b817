"""Decoding strategies over a model's State: greedy, drawn, beams; text as it comes."""

from dovetail.sampling.beam import Hypothesis, beam_search
from dovetail.sampling.config import Sampling
from dovetail.sampling.decode import Decoding, ModelSteps, Steps
from dovetail.sampling.generate import Generation, generate, sample, search, stream
from dovetail.sampling.text import Detokeniser, TextRow, Tokenizer

__all__ = [
    "Decoding", "Detokeniser", "Generation", "Hypothesis", "ModelSteps", "Sampling", "Steps", "TextRow", "Tokenizer",
    "beam_search", "generate", "sample", "search", "stream",
]  # fmt: skip
