"""Reading a config.json so that every key is used, known to be inert, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dovetail.errors import ConfigError, did_you_mean

# Keys that any transformers config may carry and that do not change what a forward pass computes. They are
# kept as they are for saving.
_INERT = (
    "architectures auto_map torch_dtype dtype transformers_version use_cache return_dict output_hidden_states "
    "output_attentions output_past torchscript use_bfloat16 pruned_heads is_decoder is_encoder_decoder "
    "chunk_size_feed_forward id2label label2id num_labels problem_type finetuning_task task_specific_params "
    "name_or_path tokenizer_class prefix tf_legacy_loss use_return_dict classifier_dropout gradient_checkpointing "
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id "
    "forced_eos_token_id max_length min_length do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "pretraining_tp max_pos_len attn_implementation model_max_length "
    "summary_activation summary_first_dropout summary_last_dropout summary_proj_to_labels summary_type "
    "summary_use_proj initializer_range init_std initializer_factor unsloth_version unsloth_fixed"
)
INERT = frozenset(_INERT.split())
# Keys that any full dump of transformers 4 carries, and the value that changes nothing.
OFF = {"add_cross_attention": False, "cross_attention_hidden_size": None, "tie_encoder_decoder": False}

LARGEST = 2**63 - 1  # of whole numbers and of the size of others
_MISSING: Any = object()


class ConfigReader:
    """A config.json being read. Take what you use; `finish` refuses what nobody took."""

    def __init__(
        self,
        data: Mapping[str, Any],
        where: str = "config.json",
        allow: Iterable[str] = (),
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ):
        self.data, self.where, self.allow = dict(data), where, set(allow)
        self.shapes = shapes or {}  # of the stored tensors, for what a config leaves unsaid
        self.used: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self.data.get(key) is not None

    def take(self, key: str, default: Any = _MISSING, kind: type | tuple[type, ...] | None = None) -> Any:
        """The value of `key`; null counts as absent. Raises ConfigError when it is missing or of another type."""
        self.used.add(key)
        value = self.data.get(key)
        if value is None:
            if default is _MISSING:
                raise ConfigError(f"config key {key!r} is missing", where=self.where)
            return default
        if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise ConfigError(f"config key {key!r} is {value!r}, which is not {_names(kind)}", where=self.where)
        return value

    def int(self, key: str, default: Any = _MISSING) -> Any:
        """A whole number of at least 1, or the default."""
        value = self.take(key, default, int)
        if value is not None and value is not default and not 1 <= value <= LARGEST:
            raise ConfigError(
                f"config key {key!r} is {_short(value)}",
                where=self.where,
                remedy="it must be at least 1" + (f" and at most {LARGEST}" if value > LARGEST else ""),
            )
        return value

    def float(self, key: str, default: Any = _MISSING, least: Any = None) -> Any:
        """A number as a float, of at least `least`, or the default."""
        value = self.take(key, default, (int, float))
        if value is not None and not (abs(value) < LARGEST and (least is None or value >= least)):  # NaN is neither
            raise ConfigError(
                f"config key {key!r} is {_short(value)}",
                where=self.where,
                remedy="it must be a finite number" + ("" if least is None else f" of at least {least}"),
            )
        return value if value is None else float(value)

    def bool(self, key: str, default: Any = _MISSING) -> bool:
        return self.take(key, default, bool)

    def inert(self, *keys: str) -> None:
        """Keys of this family that change nothing in a forward pass."""
        self.used.update(keys)

    def only(self, key: str, allowed: Iterable[Any], why: str) -> Any:
        """Takes a key of which only some values are supported; an absent key counts as the first of them.

        A key that the caller allowed to be ignored counts as absent.
        """
        values = list(allowed)
        value = values[0] if key in self.allow else self.take(key, values[0])
        if value not in values:
            raise ConfigError(
                f"config key {key!r} is {value!r}: {why}", where=self.where, remedy=f"supported: {values}"
            )
        return value

    def choose(self, key: str, table: Mapping[str, Any], default: str) -> Any:
        """Looks the key's value up in a table. Raises ConfigError naming the nearest entry."""
        name = self.take(key, default)
        if name not in list(table):  # it may be anything that JSON has, a list too
            raise ConfigError(
                f"config key {key!r} is {name!r}", where=self.where, remedy=did_you_mean(str(name), table)
            )
        return table[name]

    def contradiction(self, what: str, remedy: str | None = None) -> ConfigError:
        return ConfigError(f"the config contradicts itself: {what}", where=self.where, remedy=remedy)

    def finish(self) -> None:
        """Raises ConfigError for the keys that nobody took and that are not known to be inert."""
        if self.data.get("quantization_config"):
            said = self.data["quantization_config"]
            method = said.get("quant_method", "?") if isinstance(said, Mapping) else repr(said)
            raise ConfigError(
                f"the checkpoint is quantised ({method}), which is not supported",
                where=f"{self.where}: quantization_config",
                remedy="use an unquantised checkpoint of this model",
            )
        for key, value in OFF.items():
            if key not in self.used:
                self.only(key, [value], "it belongs to an encoder-decoder made of two models")
        unknown = [
            key
            for key in self.data
            if key not in self.used | INERT | self.allow and not key.startswith("_") and key != "quantization_config"
        ]
        if unknown:
            names = ", ".join(map(repr, unknown))
            raise ConfigError(
                f"unknown config key{'s' if len(unknown) > 1 else ''} {names}",
                where=self.where,
                remedy=f"if it changes nothing, allow it: --allow-key {unknown[0]} (dt.load(..., allow_keys=[{unknown[0]!r}]))",
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:30]}..."


def _names(kind: type | tuple[type, ...]) -> str:
    return " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
