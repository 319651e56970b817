"""Sampling: how the next token is chosen and when a row ends. Frozen and strict; contradictions are refused."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dovetail.spec.spec import validate

COLDEST = 1e-30  # scores of up to 1e8, divided by it, are still numbers of fp32


class Sampling(BaseModel):
    """One way of decoding. Options that would have no effect beside the others are refused.

    max_new_tokens, min_new_tokens: bounds on what is made for a row; before the lower one no eos is chosen.
    temperature: 0 is greedy (the likeliest token), 1 the model's own distribution. top_k, top_p (Holtzman et al.
    2019), min_p (Nguyen et al. 2024): what is cut off before drawing. repetition_penalty (Keskar et al. 2019):
    divides the score of tokens that the row holds, prompt included. no_repeat_ngram: no n tokens twice in a row.
    suppress: ids that are never chosen. beams: above 1 it is beam search. length_penalty: finished beams are
    ranked by log-probability / length**length_penalty. early_stopping: True ends a row at `beams` finished
    beams, False when the best running one is behind at its present length, "never" when no length could mend it.
    stop: texts that end a row, whenever they come; eos: ids that end it (the tokenizer's unless given). seed: draws
    are the same for the same seed and prompt, alone or in a batch; None takes a fresh one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)

    max_new_tokens: int = Field(64, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    temperature: float = Field(0.0, ge=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    no_repeat_ngram: int | None = Field(None, ge=1)
    suppress: tuple[int, ...] = ()
    beams: int = Field(1, ge=1)
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop: tuple[str, ...] = ()
    eos: tuple[int, ...] | None = None
    seed: int | None = Field(None, ge=0)

    @staticmethod
    def of(**options: Any) -> Sampling:
        """From options by name. Raises SpecError naming the option and the remedy."""
        return validate(Sampling, options)

    @field_validator("stop", "eos", "suppress", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        """One value or any sequence of them."""
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if "" in self.stop:
            raise ValueError("an empty stop string would end every row at once; leave it out")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}; raise the latter"
            )
        if 0 < self.temperature < COLDEST:
            raise ValueError(
                f"temperature={self.temperature} is below {COLDEST}, where scores divided by it overflow; "
                "set 0 for the likeliest token"
            )
        if self.beams > 1 and self.temperature > 0:
            raise ValueError(f"beams={self.beams} with temperature={self.temperature}: search or draw; set one of them")
        if self.beams > 1 and self.stop:
            raise ValueError("stop strings with beams > 1: beams end at eos ids; set eos, or beams=1")
        idle = self._without_effect()
        if idle:
            raise ValueError(idle)
        return self

    def _without_effect(self) -> str | None:
        if self.temperature == 0:
            for name in ("top_k", "top_p", "min_p", "seed"):
                if getattr(self, name) is not None:
                    return f"{name} has no effect at temperature 0, where nothing is drawn; set temperature above 0"
        if self.beams == 1:
            for name, default in (("length_penalty", 1.0), ("early_stopping", False)):
                if getattr(self, name) != default:
                    return f"{name} has no effect without beam search; set beams above 1"
        return None
