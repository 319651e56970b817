"""What a directory says of generating beyond the ids that end a text: kept and told, and not applied here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dovetail.errors import CheckpointError
from dovetail.hub import files

FILE, _START = "generation_config.json", "decoder_start_token_id"
# Keys that change what greedy decoding or a beam gives, and the value that changes nothing.
_NEUTRAL = {
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "forced_decoder_ids": None,
    "force_bos_token_to_be_generated": False,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
}


def unapplied(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Keys with values under which transformers' generate gives other text than ours.

    They stand in generation_config.json; older directories have them in config.json.
    """
    said = config
    if (folder / FILE).exists():
        try:
            said = files.read_json(folder / FILE)
        except CheckpointError:
            said = {}  # as an empty file, which says nothing
    found = {key: said[key] for key, neutral in _NEUTRAL.items() if said.get(key) not in (None, neutral, [])}
    start = said.get(_START)  # config.json alone is read for it
    if config.get("is_encoder_decoder") and start not in (None, config.get(_START)):
        found[_START] = start
    return found
