"""Compiled decoding steps: the same tokens as plain ones, prompt after prompt, with nothing compiled twice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sampling_models import VOCAB, llama

import dovetail as dt
from dovetail.errors import RunError, UserError
from dovetail.sampling import Captured, Sampling, sample, stream
from dovetail.sampling.decode import Decoding
from dovetail.surgery.storage import quantise

PROMPTS = [[[5, 6, 7, 8, 9, 10, 11, 12], [3, 4], [9, 8, 7]], [[1], [2, 3, 4, 5, 6], [7, 8]]]
MIXERS = {
    "rope, groups": {"kind": "attention", "heads": 4, "kv_heads": 2},
    "ring": {"kind": "attention", "heads": 2, "mask": {"kind": "window", "size": 5}},
    "matrix": {"kind": "linear"},
    "mamba": {"kind": "mamba"},
}


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch.compiler.reset()


def built(mixer: dict[str, Any]) -> Any:
    """Two layers whose matrices are wide enough that no two scores tie."""
    spec = {"kind": "decoder", "vocab": VOCAB, "dim": 32, "depth": 2, "context": 64, "blocks": {"mixer": mixer}}
    model = dt.build(spec).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.3)
    return model


def made(model: Any, prompts: Any, runner: Captured | None = None, **options: Any) -> tuple[list[Any], list[Any]]:
    """(tokens, log-probabilities) of every step."""
    sampling = Sampling.of(max_new_tokens=9, **options)
    steps = {} if runner is None else {"steps": lambda _, rows, new: runner.read(rows, new)}
    run = Decoding(model, prompts, sampling, eos=sampling.eos or (), logprobs=True, **steps)
    tokens, chances = [], []
    while not run.done:
        tokens.append(run.step().tolist())
        assert run.logprob is not None
        chances.append(run.logprob.tolist())
    return tokens, chances


@pytest.mark.parametrize("name", MIXERS)
def test_same_tokens_as_plain_steps(name: str) -> None:
    """Greedy, then drawn, prompt after prompt."""
    model = built(MIXERS[name])
    runner = Captured(model, 3, 24, backend="aot_eager" if name == "rope, groups" else "eager")
    for options in ({}, {"temperature": 0.9, "top_k": 20, "seed": 4}):
        for prompts in PROMPTS:
            expected, found = made(model, prompts, **options), made(model, prompts, runner, **options)
            assert found[0] == expected[0]
            torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-4)
    assert runner.compilations == 1


def test_a_row_that_ends_pads_and_constraints_hold() -> None:
    model = built(MIXERS["rope, groups"])
    runner = Captured(model, 3, 24, backend="eager")
    plain = made(model, PROMPTS[0])[0]
    for options in ({"eos": plain[2][0]}, {"repetition_penalty": 1.3}, {"suppress": (plain[0][0], plain[1][1])}):
        expected, found = made(model, PROMPTS[0], **options), made(model, PROMPTS[0], runner, **options)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert runner.compilations == 1


def test_a_changed_model_is_compiled_anew_and_an_optimiser_s_step_is_not() -> None:
    model = built(MIXERS["rope, groups"])
    runner = Captured(model, 3, 24, backend="eager")
    made(model, PROMPTS[0], runner)
    with torch.no_grad():
        model.blocks[0].mixer.qkv.weight.mul_(-1)  # in place
    assert made(model, PROMPTS[0], runner)[0] == made(model, PROMPTS[0])[0]
    assert runner.compilations == 1
    model.blocks[1].mixer.qkv.weight.data = model.blocks[1].mixer.qkv.weight.data * -1  # elsewhere
    assert made(model, PROMPTS[0], runner)[0] == made(model, PROMPTS[0])[0]
    model = dt.adapt(model, dt.adapters.Lora(rank=2))
    for name, p in model.named_parameters():
        if "adapters" in name:
            p.data.normal_()
    runner.model = model
    assert made(model, PROMPTS[0], runner)[0] == made(model, PROMPTS[0])[0]


@torch._dynamo.config.patch(recompile_limit=1)
def test_runners_do_not_crowd_each_other_out() -> None:
    model = built({"kind": "linear"})
    for rows in (1, 2):
        runner = Captured(model, rows, 24, backend="eager")
        assert made(model, PROMPTS[0][:rows], runner)[0] == made(model, PROMPTS[0][:rows])[0]


def test_public_face(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """generate, sample and stream: same results, the runner stays with the model, and copies begin without."""
    built_with: list[Captured] = []

    class Eager(Captured):
        def __init__(self, *args: Any):
            super().__init__(*args, backend="eager")
            built_with.append(self)

    monkeypatch.setattr("dovetail.sampling.captured.Captured", Eager)
    model = llama(tmp_path)[1]
    prompt = torch.tensor([[5, 9, 11], [4, 4, 8]])
    for new in (6, 12):
        expected = dt.generate(model, None, prompt, max_new_tokens=new)
        assert torch.equal(dt.generate(model, None, prompt, max_new_tokens=new, compile=True), expected)
    assert len(built_with) == 1 and built_with[0].compilations == 1
    ends = int(expected[0, 3])
    options = Sampling.of(max_new_tokens=12, eos=ends)
    found, plain = (sample(model, None, prompt, options, logprobs=True, compile=c) for c in (True, False))
    assert torch.equal(found.tokens, plain.tokens) and torch.equal(found.lengths, plain.lengths)
    torch.testing.assert_close(found.logprobs, plain.logprobs, atol=1e-4, rtol=1e-4)
    one = prompt[:1]
    assert list(stream(model, None, one, max_new_tokens=5, compile=True)) == expected[0, :5].tolist()
    assert len(built_with) == 2, "other rows"
    assert copy.deepcopy(model)._compiled_steps.captured is None
    with pytest.raises(UserError, match="beams"):
        dt.generate(model, None, prompt, max_new_tokens=4, beams=2, compile=True)


def test_refusals() -> None:
    model = built({"kind": "linear"})
    runner = Captured(model, 1, 6, backend="eager")
    with pytest.raises(UserError, match="capacity of 6"):
        runner.read([[1, 2, 3]], 4)
    with pytest.raises(UserError, match="no prompts"):
        dt.generate(model, None, [], compile=True)
    with pytest.raises(UserError, match="2 prompts for 1 rows"):
        runner.read([[1], [2]], 2)
    first = runner.read([[1, 2, 3]], 2)
    token = torch.tensor([1])
    for _ in range(3):
        first(token)
    with pytest.raises(RunError, match="full"):
        first(token)
    runner.read([[4]], 2)
    with pytest.raises(RunError, match="over"):
        runner.step(first, token)
    pair = {"kind": "encoder_decoder", "vocab": 9, "dim": 32, "decoder_start": 1}
    with pytest.raises(UserError, match="encoder-decoder"):
        Captured(dt.build(pair), 1, 8)
    learned = pair | {"encoder": {"depth": 1, "position": "learned"}, "context": 16}  # a table caps what is chosen
    with pytest.raises(UserError, match="encoder-decoder"):
        dt.generate(dt.build(learned), None, [[1, 2]], max_new_tokens=2, compile=True)


def test_one_row_on_a_cpu_is_sums_along_rows_whatever_a_weight_is_kept_in() -> None:
    """No product is left in its step, and weights stay as they lie."""
    model = built(MIXERS["rope, groups"])
    quantise(model, "int8", leave=["blocks.1.*"])
    prompts, seen = [[5, 6, 7]], list[str]()

    class Seen(Captured):
        def _compile(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
            seen.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
            return super()._compile(graph, inputs)

    plain = made(model, prompts)
    found = made(model, prompts, Seen(model, 1, 16, backend="eager"))
    assert found[0] == plain[0] and not [name for name in seen if "linear" in name or "mm" in name], seen
    torch.testing.assert_close(found[1], plain[1], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_by_inductor_on_a_cpu(dtype: torch.dtype) -> None:
    """In bf16 the compiler rounds less often than torch does, so that scores are compared, forced along the same tokens."""
    model = built(MIXERS["rope, groups"]).to(dtype)
    runner, tokens = Captured(model, 1, 16), torch.tensor([4])
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        reading, path = runner.read([[5, 6, 7]], 6), [5, 6, 7]
        for _ in range(5):
            path.append(int(tokens))
            right = exact(torch.tensor([path])).logits[:, -1]
            scores = reading(tokens).double()
            assert (scores - right).abs().max() <= 8 * torch.finfo(dtype).eps * right.abs().max()
            tokens = right.argmax(-1)
    assert runner.compilations == 1


@pytest.mark.slow
def test_same_tokens_by_inductor() -> None:
    model = built(MIXERS["rope, groups"])
    runner = Captured(model, 3, 24)
    for prompts in PROMPTS:
        assert made(model, prompts, runner)[0] == made(model, prompts)[0]
    assert runner.compilations == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("name", MIXERS)
def test_one_graph_serves_every_step_of_every_prompt(name: str) -> None:
    model = built(MIXERS[name]).cuda()
    runner = Captured(model, 3, 24)
    for prompts in PROMPTS:
        assert made(model, prompts, runner)[0] == made(model, prompts)[0]
    assert (runner.compilations, runner.captures) == (1, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("adapted", [False, True])
def test_a_row_over_a_large_vocabulary_on_cuda(adapted: bool) -> None:
    """bf16, one row, a tied head that has a kernel of its own (not with a LoRA on it): every replay the same bits, within
    bf16 of the eager scores."""
    spec = {"kind": "decoder", "vocab": 40_000, "dim": 128, "depth": 2, "context": 256,
            "head": {"kind": "ref", "path": "embedding"}, "blocks": {"mixer": {"kind": "attention", "heads": 4}}}  # fmt: skip
    model = dt.build(spec, device="cuda", dtype=torch.bfloat16, seed=0).eval()
    if adapted:
        dt.adapt(model, {"kind": "lora", "rank": 4, "targets": ["embed_tokens"]})
    runner, prompt, found = Captured(model, 1, 128), list(range(20)), []
    for _ in range(4):
        run, token = runner.read([prompt], 64), torch.tensor([7], device="cuda")
        found.append(torch.stack([run(token).clone() for _ in range(30)]))
    assert all(torch.equal(found[0], again) for again in found[1:])
    with torch.inference_mode():
        tokens = torch.tensor([[*prompt, *[7] * 30]], device="cuda")
        eager = model(tokens).logits[0, len(prompt) :].float()
    torch.testing.assert_close(found[0][:, 0], eager, rtol=0.05, atol=0.05 * float(eager.abs().max()))


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000, 4099])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_likeliest_is_the_first_of_the_best(rows: int, vocab: int) -> None:
    """By pieces: ties, infinities and what is no number as argmax has them."""
    from dovetail.sampling.captured import _best

    scores = torch.randint(0, 4, (rows, vocab)).float()
    for given in (scores, scores * 0, scores - torch.inf, torch.where(scores == 3, torch.inf, scores)):
        assert torch.equal(_best(given), given.argmax(-1))
    scores[-1, vocab // 2] = torch.nan
    assert torch.equal(_best(scores), scores.argmax(-1))


def test_each_row_is_given_its_token() -> None:
    runner = Captured(built(MIXERS["rope, groups"]), 2, 16)
    run = runner.read([[1, 2], [3]], 4)
    with pytest.raises(UserError, match="tokens for 2 rows"):
        run(torch.tensor([1]))
