"""dovetail adapt (train, merge, list) and dovetail swap --extract, through the real entry point."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dovetail as dt
from dovetail.cli.main import main
from dovetail.data import train_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `dovetail ARGS` in this process: (exit code, stdout, stderr)."""

    def call(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dovetail", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA-shaped directory with a tokenizer of its own, and beside it a text and a recipe."""
    folder = tmp_path_factory.mktemp("tiny")
    train_tokenizer(["def f(x):\n    return x\n" * 40], 300, folder / "tok")
    vocab = dt.load_tokenizer(folder / "tok").vocab_size
    mixer = {"kind": "attention", "heads": 4}
    spec = {"kind": "decoder", "vocab": vocab, "dim": 32, "depth": 2, "context": 64, "blocks": {"mixer": mixer}}
    dt.save(dt.build(spec), folder / "model", tokenizer_from=folder / "tok")
    (folder / "text.py").write_text("def f(x):\n    return x + 1\n\n" * 30)
    (folder / "recipe.yaml").write_text(
        f"model: elsewhere\ndata: {{train: {{kind: text, path: {folder / 'text.py'}}}, cache: {folder / 'cache'}}}\n"
        "adapter: {kind: lora, rank: 4, targets: [q_proj, down_proj]}\n"
        "train: {steps: 3, batch: 2, length: 32, lr: 1.0e-2, eval_every: 0}\n"
    )
    return folder


def last(out: str) -> Any:
    return json.loads(out.strip().splitlines()[-1])


def test_train_list_and_merge(run: Run, tiny: Path, tmp_path: Path) -> None:
    model, recipe, out = tiny / "model", tiny / "recipe.yaml", tmp_path / "lora"
    code, said, err = run("adapt", model, recipe, "adapter.rank=2", "--out", out, "--json")
    assert code == 0, err
    assert last(said)["steps"] == 3 and last(said)["out"] == str(out)

    code, said, err = run("adapt", out, "--list", "--json")
    facts = last(said)
    assert code == 0 and facts["kind"] == "lora" and facts["rank"] == 2, err
    assert sorted(facts["targets"]) == ["down_proj", "q_proj"]
    hidden = dt.load(model).get_submodule("blocks.0.feedforward.down").in_features  # type: ignore[attr-defined]
    assert (
        facts["parameters"]
        == 2 * 2 * ((32 + 32) + (32 + hidden))
        == last(run("adapt", out, "--list", "--json")[1])["parameters"]
    )
    code, said, _ = run("adapt", out, "--list")
    assert code == 0 and "rank: 2" in said and "q_proj" in said

    code, said, err = run("adapt", model, "--merge", out, "--out", tmp_path / "merged", "--json")
    assert code == 0 and last(said)["format"] == "hf" and last(said)["adapter"]["kind"] == "lora", err
    adapted, merged = dt.load_adapter(dt.load(model), out), dt.load(tmp_path / "merged")
    x = torch.randint(0, merged.spec.vocab, (2, 9))
    want = adapted(x).logits
    assert (merged(x).logits - want).abs().max() <= 1e-5 * want.abs().max()
    assert not torch.equal(want, dt.load(model)(x).logits)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_list_of_kinds_and_of_targets(run: Run, tiny: Path) -> None:
    code, said, _ = run("adapt", "--list", "--json")
    kinds = {a["kind"]: a for a in last(said)["adapters"]}
    assert code == 0 and set(kinds) == set(dt.registry("adapter"))
    assert (
        kinds["lora"]["merges"] == "yes" and kinds["lora"]["PEFT"] == "LORA" and all(a["what"] for a in kinds.values())
    )
    assert "[net(e);" in run("list", "adapter")[1]  # no markup
    assert "lora" in run("adapt", "--list")[1] and "lora" in run("list", "adapter")[1]
    code, said, _ = run("adapt", tiny / "model", "--list", "--json")
    targets = {t["target"]: t for t in last(said)["targets"]}
    assert code == 0 and targets["q_proj"] == {"target": "q_proj", "places": "2", "shape": "32 x 32"}
    assert {"embed_tokens", "lm_head", "down_proj"} <= set(targets)
    dt.adapt(dt.load(tiny / "model"), {"kind": "lora", "rank": 1, "targets": [*targets]})  # each can be named


def test_extract(run: Run, tiny: Path, tmp_path: Path) -> None:
    tuned = dt.load(tiny / "model")
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if ".mixer." in name or name.endswith("norm_mixer.weight"):
                p.add_(torch.randn_like(p) * 0.05)
    dt.save(tuned, tmp_path / "tuned")
    swap = ("swap", "--extract", tiny / "model", tmp_path / "tuned")
    code, said, err = run(*swap, "--energy", 0.9, "--out", tmp_path / "a", "--json")
    assert code == 0, err
    data = last(said)
    assert data == json.loads((tmp_path / "a" / "extract-report.json").read_text())
    assert {s["segment"].rsplit(".", 1)[-1] for s in data["segments"] if s["rank"]} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert all(s["energy"] >= 0.9 - 1e-6 for s in data["segments"]) and len(data["layers"]) == 2
    assert [u["name"] for u in data["uncovered"]] == ["blocks.0.norm_mixer.weight", "blocks.1.norm_mixer.weight"]
    code, said, err = run(*swap, "--rank", 64, "--target", "q_proj", "--target", "k_proj", "--target", "v_proj",
                          "--target", "o_proj", "--out", tmp_path / "b")  # fmt: skip
    assert code == 0 and "norm_mixer" in said and "8 of 8 maps changed; rank 32" in said, err
    model = dt.load_adapter(dt.load(tiny / "model"), tmp_path / "b")
    for name, p in model.named_parameters():
        if name.endswith("norm_mixer.weight"):
            p.data.copy_(dict(tuned.named_parameters())[name])
    x = torch.randint(0, tuned.spec.vocab, (1, 8))
    want = tuned(x).logits
    assert (dt.merge(model)(x).logits - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("adapt", "MODEL"), "nothing to do"),
        (("adapt", "--merge", "x", "--list"), "--merge and --list"),
        (("adapt", "MODEL", "--merge", "x"), "--out"),
        (("adapt", "MODEL", "--merge", "MODEL", "--out", "OUT"), "adapter_config.json"),
        (("adapt", "--list", "--resume"), "--list does not read --resume"),
        (("adapt", "MODEL", "RECIPE", "--out", "MODEL"), "would be written over"),
        (("swap", "--extract", "MODEL", "TUNED", "--rank", "2", "--out", "MODEL"), "a model stands in this folder"),
        (("adapt", "MODEL", "RECIPE", "adapter=null", "--out", "OUT"), "has no adapter"),
        (("adapt", "MODEL", "RECIPE", "adapter.rnk=3", "--out", "OUT"), "did you mean 'rank'?"),
        (("adapt", "MODEL", "RECIPE", "tokenizer={train: 300}", "--out", "OUT"), "ids mean nothing"),
        (("swap", "--extract", "MODEL", "MODEL", "--rank", "2", "--out", "OUT"), "do not differ"),
        (("swap", "--extract", "MODEL", "MODEL", "--out", "OUT"), "give one of the two"),
        (("swap", "--extract", "MODEL", "MODEL", "--rank", "2", "--text", "x", "--out", "OUT"), "does not read --text"),
        (("swap", "MODEL", "blocks.*.mixer.kv_heads=2", "--rank", "2", "--out", "OUT"), "does not read --rank"),
    ],
)
def test_refusals(run: Run, tiny: Path, tmp_path: Path, args: tuple[str, ...], says: str) -> None:
    if "TUNED" in args:
        tuned = dt.load(tiny / "model")
        next(tuned.blocks[0].mixer.parameters()).data.mul_(1.5)
        dt.save(tuned, tmp_path / "tuned")
    words = {
        "MODEL": tiny / "model",
        "TUNED": tmp_path / "tuned",
        "RECIPE": tiny / "recipe.yaml",
        "OUT": tmp_path / "out",
    }
    code, _, err = run(*(words.get(a, a) for a in args))
    assert code == 2 and says in err and "Traceback" not in err and not (tmp_path / "out").exists()
    assert dt.load(tiny / "model") is not None  # still there, and whole
