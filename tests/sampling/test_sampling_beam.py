"""Beam search against transformers' on decoders and encoder-decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dovetail as dt
from dovetail.errors import UserError
from dovetail.sampling import Sampling, beam_search, generate, search

PROMPTS = [[5, 17, 9], [41, 2, 8], [8, 30, 55]]


def peer_beams(peer: Any, ids: torch.Tensor, sampling: Sampling, **more: Any) -> Any:
    return peer.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=sampling.beams, num_return_sequences=sampling.beams,
        max_new_tokens=sampling.max_new_tokens, length_penalty=sampling.length_penalty, do_sample=False,
        early_stopping=sampling.early_stopping, return_dict_in_generate=True, output_scores=True, **more,
    )  # fmt: skip


def check(got: Any, want: Any, skip: int, eos: list[int], beams: int) -> None:
    flat = [hypothesis for row in got for hypothesis in row]
    assert len(flat) == len(want.sequences)
    for ours, ids, score in zip(flat, want.sequences[:, skip:].tolist(), want.sequences_scores.tolist()):
        cut = next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids))
        assert list(ours.ids) == ids[:cut]
        assert abs(ours.score - score) < 1e-4 * max(1, abs(score))


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (4, 0.0), (3, 2.0), (4, -0.5)])
def test_equals_transformers_on_llama(pair: Any, early: Any, beams: int, penalty: float) -> None:
    """Every fifth id ends a beam, so that finished and running beams compete all the way."""
    peer, ours = pair
    eos = list(range(2, 97, 9))
    sampling = Sampling(max_new_tokens=12, beams=beams, length_penalty=penalty, early_stopping=early, eos=tuple(eos))
    want = peer_beams(peer, torch.tensor(PROMPTS), sampling, eos_token_id=eos, pad_token_id=0)
    got = search(ours, None, PROMPTS, sampling)
    check(got, want, 3, eos, beams)
    best = generate(ours, None, PROMPTS, **sampling.model_dump(exclude_defaults=True))
    for row, found in zip(best.tolist(), got):
        assert tuple(row[: len(found[0].ids)]) == found[0].ids


def test_constraints_equal_transformers(pair: Any) -> None:
    peer, ours = pair
    sampling = Sampling(
        max_new_tokens=10, min_new_tokens=4, beams=3, repetition_penalty=1.5, no_repeat_ngram=2, eos=(2, 7, 60)
    )
    want = peer_beams(
        peer, torch.tensor(PROMPTS), sampling, eos_token_id=[2, 7, 60], pad_token_id=0, min_new_tokens=4,
        repetition_penalty=1.5, no_repeat_ngram_size=2,
    )  # fmt: skip
    check(search(ours, None, PROMPTS, sampling), want, 3, [2, 7, 60], 3)


def test_rows_of_uneven_length_do_not_know_of_each_other(pair: Any) -> None:
    _, ours = pair
    sampling = Sampling(max_new_tokens=8, beams=3, eos=(2, 30, 31, 60))
    ragged = [[5], *PROMPTS, [9] * 11]
    for ids, together in zip(ragged, search(ours, None, ragged, sampling)):
        (alone,) = search(ours, None, [ids], sampling)
        assert [h.ids for h in together] == [h.ids for h in alone]
        torch.testing.assert_close([h.score for h in together], [h.score for h in alone], rtol=1e-4, atol=1e-4)


class PeerSteps:
    """transformers' BART as a step function: what beam search asks of an encoder-decoder."""

    def __init__(self, peer: Any, source: torch.Tensor):
        from transformers.modeling_outputs import BaseModelOutput

        self.peer, self.make = peer, BaseModelOutput
        self.memory = peer.get_encoder()(source).last_hidden_state
        self.past: Any = None

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        memory = self.make(last_hidden_state=self.memory)
        out = self.peer(
            encoder_outputs=memory, decoder_input_ids=tokens[:, None], past_key_values=self.past, use_cache=True
        )
        self.past = out.past_key_values
        return out.logits[:, -1]

    def reorder(self, rows: torch.Tensor) -> None:
        self.memory = self.memory[rows]
        self.past.reorder_cache(rows)


BART_EOS = [2, 11, 12, 40]


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(5)
    config = BartConfig(
        vocab_size=61, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=40, init_std=0.5,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    peer = BartForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("bart")
    peer.save_pretrained(folder)
    return peer, dt.load(folder)


@pytest.mark.parametrize(("beams", "penalty", "early"), [(2, 1.0, False), (4, 2.0, True), (3, 0.5, "never")])
@torch.no_grad()
def test_equals_transformers_on_bart(bart: Any, beams: int, penalty: float, early: Any) -> None:
    """The same search over transformers' own BART as a step function, and over ours with its state."""
    peer, ours = bart
    source = torch.randint(3, 61, (2, 7))
    sampling = Sampling(
        max_new_tokens=11, beams=beams, length_penalty=penalty, early_stopping=early, eos=tuple(BART_EOS)
    )
    want = peer_beams(peer, source, sampling, eos_token_id=BART_EOS)
    steps = PeerSteps(peer, source)
    start = torch.full((2,), 2)
    check(
        beam_search(steps, steps(start), start[:, None].tolist(), sampling, eos=sampling.eos or ()),
        want,
        1,
        BART_EOS,
        beams,
    )
    check(search(ours, None, source, sampling), want, 1, BART_EOS, beams)


def test_sources_of_uneven_length(bart: Any) -> None:
    peer, ours = bart
    sources = [[9, 30, 5, 44, 7], [50, 3], [21]]
    options = {"max_new_tokens": 10, "repetition_penalty": 1.4}
    for i, ids in enumerate(sources):
        want = peer.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
            num_beams=1, eos_token_id=BART_EOS, **options,
        )[0, 1:].tolist()  # fmt: skip
        got = generate(ours, None, sources, eos=BART_EOS, **options)[i].tolist()
        assert got[: len(want)] == want
    with pytest.raises(UserError, match="table has 40"):
        generate(ours, None, [[5] * 41], max_new_tokens=2)
    with pytest.raises(UserError, match="need 41 positions"):
        generate(ours, None, [[5] * 4], max_new_tokens=40)
