"""Lengths: rows are made as they say, keys and copies are scored exactly, and a study of them goes on where it stood."""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dovetail as dt
from dovetail import surgery
from dovetail.data.tokenizer import train_tokenizer
from dovetail.errors import DataError, DovetailError, SpecError
from dovetail.report import study as studies
from dovetail.report.lengths import (
    ANSWER,
    CUE,
    SYMBOLS,
    Lengths,
    Variant,
    Wording,
    copied,
    endings,
    examine,
    exams,
    likeliest,
    measured,
    passkeys,
    repeated,
)
from dovetail.report.study import Study, study
from dovetail.report.study_page import Found, Row, page
from dovetail.report.text import recut
from dovetail.spec import Spec, override
from dovetail.training.loop import Run

ROOT = Path(__file__).parents[2]
SHORT, LONG = 96, 192
SPEC: dict[str, Any] = {
    "kind": "decoder", "dim": 32, "depth": 2, "context": SHORT,
    "blocks": {"mixer": {"kind": "attention", "heads": 4}, "feedforward": {"kind": "glu", "hidden": 48}},
}  # fmt: skip
WORDING = Wording(torch.arange(100, 108), torch.arange(110, 114), torch.arange(120, 130))


@pytest.fixture(scope="module")
def trained(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose context is long enough for questions."""
    vocab = dt.load_tokenizer(checkpoint).vocab_size
    folder = tmp_path_factory.mktemp("trained")
    return dt.save(dt.build(SPEC | {"vocab": vocab}), folder, tokenizer_from=checkpoint)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> dict[str, str]:
    path = tmp_path_factory.mktemp("corpus") / "text"
    path.write_text(texts["held_out"])
    return {"kind": "text", "path": str(path)}


def asked(corpus: dict[str, str], **more: Any) -> Lengths:
    fields = {
        "text": Spec.parse("corpus", corpus),
        "at": (SHORT, LONG),
        "tokens": 4 * LONG,
        "questions": 3,
        "buckets": 4,
    }
    return Lengths(**(fields | more))


def test_repeated_rows() -> None:
    rows = torch.arange(14).view(2, 7)
    for length in (8, 13, 20):
        made = repeated(rows, length)
        assert made.shape == (2, length + 1)
        assert made[1].tolist() == [7 + t % 7 for t in range(length + 1)]


def test_exams_depend_on_seed_and_text_alone(corpus: dict[str, str], trained: Path) -> None:
    tokenizer = dt.load_tokenizer(trained)
    one, again, other = (exams(tokenizer, asked(corpus), seed) for seed in (0, 0, 1))
    for n in (SHORT, LONG):
        for name in ("text", "repeated", "passkeys", "copied"):
            a, b, c = (getattr(e[n], name) for e in (one, again, other))
            if name == "repeated" and n == SHORT:
                assert a is None
                continue
            assert torch.equal(a, b) and not torch.equal(a, c) and a.shape[1] == n + 1
    assert torch.equal(one[SHORT].text, recut(one[LONG].text, SHORT))  # the same questions at every length
    assert one[LONG].text.shape[0] == 4 and one[LONG].passkeys.shape[0] == 3
    stream = " ".join(map(str, torch.tensor(tokenizer.encode(Path(corpus["path"]).read_text())).tolist()))
    assert all(" ".join(map(str, row.tolist())) in stream for row in one[LONG].text)
    assert torch.equal(one[LONG].repeated[:, :SHORT], one[LONG].text[:, :SHORT])  # type: ignore[index]
    assert torch.equal(one[LONG].repeated[:, SHORT:LONG], one[LONG].text[:, :SHORT])  # type: ignore[index]


def test_passkey_rows() -> None:
    texts = torch.arange(1000, 1200).view(2, 100)
    made = passkeys(texts, 80, 6, WORDING, torch.Generator().manual_seed(0))
    places = set()
    for i, row in enumerate(made.tolist()):
        key = row[-SYMBOLS:]
        ask = [*WORDING.tell.tolist(), *key]
        assert row[-len(ask) :] == ask and all(120 <= d < 130 for d in key)
        told = next(t for t in range(len(row)) if row[t : t + len(ask)] == ask)
        tell = [*ask, *WORDING.remember.tolist()]
        assert row[told : told + len(tell)] == tell
        around = row[:told] + row[told + len(tell) : -len(ask)]
        assert around == texts[i % 2, : len(around)].tolist() and len(row) == 81
        places.add(told)
    assert len(places) > 3
    with pytest.raises(DataError, match="a passkey takes 30 tokens, a row has 30"):
        passkeys(texts, 29, 1, WORDING, torch.Generator())


def test_copied_rows() -> None:
    texts = torch.arange(1000, 1300).view(2, 150)
    made = copied(texts, 120, 4, 8, torch.Generator().manual_seed(0))
    for i, row in enumerate(made.tolist()):
        text = texts[i % 2].tolist()
        body, passage = row[: -CUE - ANSWER], row[-CUE - ANSWER :]
        start = text.index(passage[0])
        assert len(row) == 121 and body == text[: len(body)] and start < 8
        assert passage == text[start : start + CUE + ANSWER]
    with pytest.raises(DataError, match="cannot hold a passage of 32 twice"):
        copied(texts, 70, 1, 8, torch.Generator())


def test_the_likeliest_among_some() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 2.0], [9.0, 5.0, 1.0, 2.0]])
    labels = torch.tensor([1, 3])
    assert likeliest(logits, labels).tolist() == [True, False]
    assert likeliest(logits, labels, torch.tensor([2, 3])).tolist() == [False, True]


class Induction(nn.Module):
    """Says what followed the longest earlier repetition of the end of what it is shown; id 0 where there is none."""

    def __init__(self, vocab: int):
        super().__init__()
        self.spec = dt.build(SPEC | {"vocab": vocab}).spec
        self.weight, self.head, self.vocab = nn.Parameter(torch.zeros(())), nn.Identity(), vocab

    def forward(self, tokens: Tensor, logits: bool = True) -> Any:
        said = [[self.next(row[: t + 1]) for t in range(len(row))] for row in tokens.tolist()]
        return SimpleNamespace(last_hidden_state=nn.functional.one_hot(torch.tensor(said), self.vocab).float())

    def next(self, seen: list[int]) -> int:
        best, found = 0, 0
        for end in range(1, len(seen)):
            size = 0
            while size < end and seen[end - 1 - size] == seen[-1 - size]:
                size += 1
            if size >= max(best, 1):
                best, found = size, seen[end]
        return found


def test_an_oracle_finds_keys_and_copies_that_it_sees() -> None:
    draw = torch.Generator().manual_seed(1)
    model = Induction(130)
    texts = torch.stack([torch.randperm(99, generator=draw)[:90] for _ in range(3)])
    keys = passkeys(texts, 80, 8, WORDING, draw)
    assert endings(model, keys, SYMBOLS, WORDING.symbols).all()
    see = 50
    told = [row.index(100) for row in keys.tolist()]
    seen = torch.tensor([t >= 80 - see for t in told])
    gone = torch.tensor([t + len(WORDING.tell) + SYMBOLS <= 80 - see for t in told])
    right = endings(model, keys, SYMBOLS, WORDING.symbols, see=see)
    assert right[seen].all() and seen.any() and gone.any()
    assert not right[gone].all(1).any()
    passages = copied(texts, 80, 3, 4, draw)
    assert endings(model, passages, ANSWER).all() and not endings(model, passages, ANSWER, see=see)[:, 0].any()


def test_measured_is_what_the_model_says(corpus: dict[str, str], trained: Path) -> None:
    model, tokenizer = dt.load(trained), dt.load_tokenizer(trained)
    papers, symbols = exams(tokenizer, asked(corpus), 0), Wording.of(tokenizer, asked(corpus).symbols).symbols
    found = measured(model, papers, symbols, 4)
    assert set(found["metrics"]) == set(asked(corpus).titles)
    for name, rows in ((f"{SHORT}", papers[SHORT].text), (f"{LONG} repeated", papers[LONG].repeated)):
        assert rows is not None
        logits = model.eval()(rows[:, :-1]).logits.detach().double()
        nats = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        assert found["metrics"][f"loss@{name}"] == pytest.approx(float(nats), rel=1e-5)
        share = 100 * float((logits.argmax(-1) == rows[:, 1:]).double().mean())
        assert found["metrics"][f"accuracy@{name}"] == pytest.approx(share, abs=1e-9)
    keys = papers[LONG].passkeys
    logits = model(keys[:, :-1]).logits[:, -SYMBOLS:, symbols]
    share = 100 * float((symbols[logits.argmax(-1)] == keys[:, -SYMBOLS:]).double().mean())
    assert found["metrics"][f"passkey@{LONG}"] == pytest.approx(share)
    assert [(a, b) for a, b, _ in found["curve"]] == [(0, 48), (48, 96), (96, 144), (144, 192)]
    mean = sum(nats for *_, nats in found["curve"]) / 4
    assert mean == pytest.approx(found["metrics"][f"loss@{LONG}"], rel=1e-6)
    short = measured(model, papers, symbols, 4, SHORT)["metrics"]  # truncation changes nothing at the trained length
    assert all(short[name] == found["metrics"][name] for name in short if f"@{SHORT}" in name)
    assert short[f"loss@{LONG}"] != found["metrics"][f"loss@{LONG}"]


def test_passkeys_are_made_of_symbols_that_are_one_token(corpus: dict[str, str], tmp_path: Path) -> None:
    tokenizer = train_tokenizer([" one two six. " * 9], 280, tmp_path)
    for symbols in ("0123456789", ("one", "two", "six")):
        found = Wording.of(tokenizer, symbols)
        said = [tokenizer.decode([*found.tell.tolist(), i]) for i in found.symbols.tolist()]
        assert said == [f"\nThe pass key is {symbol}" for symbol in symbols]
    with pytest.raises(DovetailError, match=r"(?s)'seven'.*lengths.symbols"):
        Wording.of(tokenizer, ("one", "seven"))
    with pytest.raises(ValueError, match="all different"):
        asked(corpus, symbols=("a", "a"))


def test_variants_start_nothing_anew(corpus: dict[str, str], trained: Path) -> None:
    model, tokenizer = dt.load(trained), dt.load_tokenizer(trained)
    with pytest.raises(SpecError, match="trained at 96"):
        examine(model, tokenizer, asked(corpus, at=(100, LONG)), (), 0)
    with pytest.raises(DovetailError, match="variant 'x'"):
        examine(model, tokenizer, asked(corpus), (Variant(name="x", swap={"blocks.*.mixer": "gru"}),), 0)
    with pytest.raises(SpecError, match=r"(?s)mixr.*variant 'x'"):
        examine(model, tokenizer, asked(corpus), (Variant(name="x", swap={"blocks.*.mixr.position": "none"}),), 0)


@pytest.fixture()
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process: others take seconds to start, and test_study.py has them."""
    monkeypatch.setattr(studies, "processes", lambda jobs: ThreadPoolExecutor(1))


def recipe(folder: Path, trained: Path, corpus: dict[str, str]) -> dict[str, Any]:
    train = {"steps": 1, "batch": 2, "length": SHORT, "autocast": "none", "device": "cpu"}
    place = "blocks.*.mixer.position"
    return {
        "name": "tiny",
        "base": {"model": str(trained), "data": {"train": corpus, "cache": str(folder / "cache")}, "train": train},
        "arms": [
            {
                "name": "rope",
                "variants": [
                    {"name": "PI", "swap": {place: {"kind": "linear", "factor": 2.0}}},
                    {
                        "name": "YaRN + LogN",
                        "swap": {place: "logn", f"{place}.position": {"kind": "yarn", "factor": 2.0}},
                    },
                    {"name": "truncated", "truncate": True},
                ],
            },
            {"name": "longer", "change": {"train.steps": 2}},
        ],
        "seeds": [0, 1],
        "lengths": {"text": corpus, "at": [SHORT, LONG], "tokens": 2 * LONG, "questions": 2, "buckets": 4},
        "published": [
            {"metric": f"accuracy@{LONG} repeated", "source": "a paper", "values": {"rope": 2.0, "rope: PI": 1.0}},
            {
                "metric": f"accuracy@{LONG}",
                "source": "a paper",
                "apart": 1.0,
                "values": {"rope": 2.5, "rope: PI": 2.0, "longer": 4.0},
            },
        ],
        "out": str(folder / "out"),
    }


@pytest.mark.usefixtures("here")
def test_what_lengths_cannot_ask_is_said_before_the_training(
    tmp_path: Path, trained: Path, corpus: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data: dict[str, Any] = recipe(tmp_path, trained, corpus) | {"published": []}
    monkeypatch.setattr(Run, "train", lambda *_, **__: pytest.fail("it was trained"))
    variant = {"name": "anew", "swap": {"blocks.*.mixer": "gru"}}
    for change, said in (
        ({"arms": [{"name": "rope", "variants": [variant]}]}, "variant 'anew'"),
        ({"lengths": data["lengths"] | {"at": [SHORT - 1, LONG]}}, f"trained at {SHORT}"),
        ({"lengths": data["lengths"] | {"symbols": ["glue", "qq"]}}, "lengths.symbols"),
    ):
        with pytest.raises(DovetailError, match=said):
            study(data | change, quiet=True)


@pytest.mark.usefixtures("here")
def test_a_study_of_lengths(tmp_path: Path, trained: Path, corpus: dict[str, str]) -> None:
    data = recipe(tmp_path, trained, corpus)
    assert pickle.loads(pickle.dumps(Study.load(data))) == Study.load(data)  # it goes to other processes
    found = study(data, quiet=True)
    assert [row.name for row in found.rows] == ["rope", "rope: PI", "rope: YaRN + LogN", "longer"]
    assert found.rival is not None and found.rival.name == "rope: truncated" and found.main == f"accuracy@{LONG}"
    assert found.rows[0].spent["peak_bytes"] > 0 and not found.rows[1].spent
    kept = [tmp_path / "out" / "runs" / arm / seed / "found.json" for arm in ("rope", "longer") for seed in "01"]
    said = [json.loads(path.read_text()) for path in kept]
    nats = [one["variants"]["PI"]["metrics"][f"loss@{LONG}"] for one in said[:2]]
    metrics = found.rows[1].metrics[f"loss@{LONG}"]
    assert metrics == pytest.approx((sum(nats) / 2, abs(nats[0] - nats[1])))
    assert set(found.curves) == {"every arm as it is", "rope"} and len(found.curves["rope"]) == 4
    assert len(found.against_print(found.tables[1])) == 2  # 2.5 and 2.0 are not apart

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    row = next(r for r in report["rows"] if (r["case"], r["metric"]) == ("rope: PI", f"token accuracy at {LONG}, %"))
    assert row["published"] == 2.0 and row["peer"] == "rope: truncated" and "peak_mb" not in row
    text = (tmp_path / "out" / "index.html").read_text()
    assert text.count("<svg") == 2 and "trained length" in text and "Passkey:" in text and "a paper" in text

    times = [path.stat().st_mtime_ns for path in kept]
    kept[3].unlink()  # as if interrupted there
    study(data, quiet=True)
    after = [path.stat().st_mtime_ns for path in kept]
    assert after[:3] == times[:3] and after[3] != times[3]
    assert json.loads(kept[3].read_text()) | {"tokens_per_s": 0, "seconds": 0} == said[3] | {
        "tokens_per_s": 0,
        "seconds": 0,
        "peak_bytes": json.loads(kept[3].read_text())["peak_bytes"],
    }


@pytest.mark.usefixtures("here")
def test_a_study_without_training(tmp_path: Path, trained: Path, corpus: dict[str, str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(trained, folder)
    data = recipe(tmp_path, trained, corpus) | {"base": {"model": str(folder)}, "published": None, "seeds": [3]}
    data["arms"] = [data["arms"][0], {"name": "the other", "change": {"model": str(trained)}}]
    found = study(data, quiet=True)
    rows = {row.name: row for row in found.rows}
    assert rows["rope"].metrics == rows["the other"].metrics and rows["rope"].trainable == 0
    kept = [tmp_path / "out" / "runs" / arm / "3" / "found.json" for arm in ("rope", "the-other")]
    times = [path.stat().st_mtime_ns for path in kept]
    vocab = dt.load_tokenizer(trained).vocab_size
    dt.save(dt.build(SPEC | {"vocab": vocab}, seed=7), folder, tokenizer_from=trained)  # the same folder, other weights
    again = {row.name: row for row in study(data, quiet=True).rows}
    after = [path.stat().st_mtime_ns for path in kept]
    assert after[0] != times[0] and after[1] == times[1]
    assert again["rope"].metrics[f"loss@{LONG}"] != again["the other"].metrics[f"loss@{LONG}"]
    assert "parameters" in (tmp_path / "out" / "index.html").read_text()


def test_losses_are_better_where_smaller_and_many_pairs_are_counted() -> None:
    rows = tuple(Row(f"r{i}", {"loss@8": (float(i), 0.0)}, 0, 1, {}) for i in range(6))
    printed = {"metric": "loss@8", "source": "s", "values": {f"r{i}": -float(i if i < 5 else 0.5) for i in range(6)}}
    found = Found("n", "d", "cpu", {}, "c", (0, 1), "loss@8", {"loss@8": "nats"}, rows, None, printed, (), {}, "o",
                  smaller=frozenset({"loss@8"}), curves={"all": {"r0": ([0.5], [1.0])}})  # fmt: skip
    assert found.orders()[0].outcome == "below"
    text = str(found)
    assert "15 pairs: 11 as in print, 0 unresolved here, 4 CONTRADICTS print" in text and "r1 above r5" not in text
    assert "<svg" in page(found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lengths": {"text": {"kind": "pydoc"}, "at": [64]}}, "two or more lengths"),
        ({"lengths": {"text": {"kind": "pydoc"}, "at": [64, 32]}}, "rising"),
        ({"lengths": None, "published": None}, "only lengths ask them"),
        ({"generate": {"data": {"kind": "docstrings"}}}, "not both"),
        ({"main": "accuracy@95"}, "no metric 'accuracy@95'"),
        ({"arms": [{"name": "rope", "variants": [{"name": "x"}]}]}, "changes nothing"),
        ({"arms": [{"name": "rope", "variants": [{"name": "x", "truncate": True}] * 2}]}, "two rows are called"),
        (
            {"arms": [{"name": n, "variants": [{"name": "x", "truncate": True}]} for n in "ab"], "published": None},
            "one is enough",
        ),
        ({"published": {"metric": "copied@96", "source": "s", "values": {"rope: P": 1.0, "rope": 2.0}}}, "'rope: P'"),
        ({"base": {"model": "m"}}, "'train.steps' has no effect where nothing is trained"),
        ({"base": {"model": "m"}, "lengths": None, "published": None, "arms": [{"name": "a"}]}, "nothing asked"),
        ({"base": {"model": {"kind": "decoder"}}}, "nothing is trained"),
    ],
)
def test_refusals(tmp_path: Path, trained: Path, corpus: dict[str, str], change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Study.load(recipe(tmp_path, trained, corpus) | change)


def test_the_shipped_recipes() -> None:
    """Every arm is a model, every variant fits it, and HWFA is what surgery says."""
    for name in ("extrapolation", "extrapolation_cpu"):
        found = Study.load(ROOT / "recipes" / f"{name}.yaml")
        for arm in found.arms if found.trains else ():
            spec = _spec(found, arm)
            for variant in arm.variants:
                assert variant.truncate or override(spec, variant.swap) != spec, (arm.name, variant.name)
    found = Study.load(ROOT / "recipes" / "extrapolation.yaml")
    arms = {arm.name: arm for arm in found.arms}
    rope, hybrid, second = (_spec(found, arms[name]) for name in ("RoPE", "HWFA", "HWFA2 w64 f2"))
    assert hybrid == override(rope, surgery.hwfa(rope))
    assert override(second, arms["HWFA2 w64 f2"].variants[0].swap) == override(
        rope, surgery.hwfa_rerope(rope, window=64)
    )


def _spec(found: Study, arm: Any) -> Spec:
    model = found.recipe(arm, 0).model
    assert isinstance(model, dict)
    return Spec.parse("model", model | {"vocab": 8192, "context": 512})
