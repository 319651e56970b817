"""From files to batches: corpora, tokenizers, memory-mapped token sets, rows, samplers.

A file put in this folder registers itself.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

from dovetail.data.corpus import Corpus  # noqa: E402
from dovetail.data.pairs import Pairs  # noqa: E402
from dovetail.data.rows import Batches, DocumentRows, PackedRows, PairRows, rows_of  # noqa: E402
from dovetail.data.sampler import Sampler  # noqa: E402
from dovetail.data.scenes import Clips, Scenes, Windows  # noqa: E402
from dovetail.data.tokenizer import train_tokenizer  # noqa: E402
from dovetail.data.tokens import TokenSet, cache_folder, prepare  # noqa: E402

__all__ = [
    "Batches", "Clips", "Corpus", "DocumentRows", "PackedRows", "PairRows", "Pairs", "Sampler", "Scenes", "TokenSet",
    "Windows", "cache_folder", "prepare", "rows_of", "train_tokenizer",
]  # fmt: skip
