"""A pair of equal models, ours and transformers', and tokenizers trained on the spot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sampling_models import llama


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return llama(tmp_path_factory.mktemp("llama"))


TEXT = [
    "the cat sat on the mat, and the dog on the log.",
    "def main():\n    return 0",
    "床前明月光，疑是地上霜。",
    "naïve façade — déjà vu 👩‍🚀🚀 ok",
] * 3


@pytest.fixture(scope="session", params=["bytes", "pieces"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """Byte-level BPE (GPT-2's way) and pieces with byte fallback (LLaMA's way), small enough to split characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    from dovetail.hub import Tokenizer as Ours

    if request.param == "bytes":
        fast = Tokenizer(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
        fast.train_from_iterator(TEXT, trainer)
    else:
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        letters = [*"▁abcdefghijklmnopqrstuvwxyz.,()", "月", "光"]
        vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, *letters, "▁t", "▁th", "▁the"])}
        merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
        fast = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        fast.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        fast.add_special_tokens(["<s>", "</s>"])
    return Ours(fast, bos="<s>", eos=["</s>"])
