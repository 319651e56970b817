"""Decoding strategies over a model's State: greedy, drawn, beams, drafts; text as it comes."""

from dovetail.sampling.beam import Hypothesis, beam_search
from dovetail.sampling.captured import Captured
from dovetail.sampling.config import Sampling
from dovetail.sampling.decode import Decoding, ModelSteps, Steps
from dovetail.sampling.drafts import DraftModel, NgramDraft, PromptLookup
from dovetail.sampling.generate import Generation, generate, sample, search, stream
from dovetail.sampling.speculative import Speculation, SpeculativeDecoding
from dovetail.sampling.text import Detokeniser, TextRow, Tokenizer

__all__ = [
    "Captured", "Decoding", "Detokeniser", "DraftModel", "Generation", "Hypothesis", "ModelSteps", "NgramDraft", "PromptLookup",
    "Sampling", "Speculation", "SpeculativeDecoding", "Steps", "TextRow", "Tokenizer", "beam_search", "generate",
    "sample", "search", "stream",
]  # fmt: skip
