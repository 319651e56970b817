"""Every command as written, through the real entry point: output, exit codes, messages for people."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import dovetail as dt
from dovetail.cli.main import main
from dovetail.data import train_tokenizer
from dovetail.errors import CheckpointError
from dovetail.stats import NGram
from dovetail.surgery import quantise

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `dovetail ARGS` in this process: (exit code, stdout, stderr). Speeds are measured in as few rounds as may be."""
    monkeypatch.setattr(import_module("dovetail.report.swap"), "_SECONDS", 0.0)

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
    """A LLaMA-shaped directory with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    train_tokenizer(["def f(x):\n    return x\n" * 40, "class A:\n    pass\n" * 40], 300, folder / "tok")
    vocab = dt.load_tokenizer(folder / "tok").vocab_size
    mixer = {"kind": "attention", "heads": 4}
    spec = {"kind": "decoder", "vocab": vocab, "dim": 32, "depth": 2, "context": 64, "blocks": {"mixer": mixer}}
    dt.save(dt.build(spec), folder / "model", tokenizer_from=folder / "tok")
    return folder / "model"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text("def f(x):\n    return x + 1\n\n" * 30)
    return path


def last(out: str) -> Any:
    return json.loads(out.strip().splitlines()[-1])


def test_list_names_every_part_as_json(run: Run) -> None:
    code, out, _ = run("list", "--json")
    data = last(out)
    assert code == 0
    assert {p["kind"] for p in data["mixer"]} == set(dt.registry("mixer"))
    beside = {name: data.pop(name) for name in ("arrangement", "layout")}
    assert all(p["oracle"] and p["source"] for parts in data.values() for p in parts)
    assert [row["kind"] for row in beside["arrangement"]] == ["hwfa", "hwfa_rerope"]
    assert {"llama", "bert", "roformer", "t5", "deberta-v2", "xlnet"} <= {row["kind"] for row in beside["layout"]}
    assert all(row["what"] and row["source"] for rows in beside.values() for row in rows)
    table = run("list", "arrangement")[1]
    assert "hwfa_rerope" in table and "mixer" not in table


def test_list_of_an_unknown_category(run: Run) -> None:
    code, _, err = run("list", "mixr")
    assert code == 2 and "did you mean 'mixer'?" in err and "Traceback" not in err
    assert "did you mean 'layout'?" in run("list", "layuot")[2]


def test_show_tree_plan_and_json(run: Run, tiny: Path) -> None:
    code, out, _ = run("show", tiny, "--plan")
    assert code == 0 and "position: rope" in out and "sdpa" in out
    code, out, _ = run("show", tiny, "--plan", "--json")
    data = last(out)
    assert data["spec"]["kind"] == "decoder" and {p["use"] for p in data["plan"]} >= {"decoding", "training, prefill"}
    assert data["parameters"] == sum(p.numel() for p in dt.load(tiny).parameters())


def test_show_reads_numbers_as_recipes_do(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(
        "kind: decoder\nvocab: 8\ndim: 8\ndepth: 1\nblocks: {mixer: {kind: attention, position: {kind: rope, theta: 1e6}}}\n"
    )
    code, out, err = run("show", file, "--json")
    assert code == 0 and last(out)["spec"]["blocks"]["mixer"]["position"]["theta"] == 1e6, err


def test_generate_is_greedy_and_reproducible(run: Run, tiny: Path) -> None:
    args = ("generate", tiny, "--prompt", "def f", "--max-new-tokens", 8, "--temperature", 0, "--json")
    first, second = run(*args), run(*args)
    assert first[0] == 0 and last(first[1]) == last(second[1])
    model, tokenizer = dt.load(tiny), dt.load_tokenizer(tiny)
    assert last(first[1])[0]["text"] == dt.generate(model, tokenizer, "def f", max_new_tokens=8, temperature=0)
    drawn = ("generate", tiny, "--prompt", "def f", "--max-new-tokens", 8)  # by seed 0 unless another is given
    assert run(*drawn)[1] == run(*drawn)[1] == run(*drawn, "--seed", 0)[1] != run(*drawn, "--seed", 1)[1]


def test_generate_names_what_it_does_not_apply(run: Run, tiny: Path, tmp_path: Path) -> None:
    """Of what a checkpoint says of generating."""
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m/generation_config.json").write_text(
        '{"no_repeat_ngram_size": 2, "min_length": 0, "eos_token_id": 3}'
    )
    args = ("--prompt", "def f", "--max-new-tokens", 2, "--temperature", 0)
    code, _, err = run("generate", tmp_path / "m", *args)
    assert code == 0 and "no_repeat_ngram_size" in err and "min_length" not in err
    assert "not applied" not in run("generate", tiny, *args)[2]


def test_generate_with_drafts_says_the_same_and_what_they_were_worth(
    run: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    tokenizer = dt.load_tokenizer(tiny)
    grams = NGram.fit(tokenizer.encode(text.read_text()), 3, "witten-bell", vocab=tokenizer.vocab_size)
    grams.save_arpa(tmp_path / "ids.arpa")
    args = ("generate", tiny, "--prompt", "def f(x):\n    return", "--max-new-tokens", 12, "--temperature", 0)
    plain = last(run(*args, "--json")[1])[0]
    for draft in ("lookup", f"ngram:{text}", f"ngram:{tmp_path}/ids.arpa", tiny):
        code, out, _ = run(*args, "--draft", draft, "--draft-tokens", 3, "--json")
        found = last(out)[0]
        assert code == 0 and found["text"] == plain["text"] and (draft == "lookup" or found["draft"]["proposed"] > 0)
    assert found["draft"]["accepted"] == found["draft"]["proposed"] and found["draft"]["tokens_per_forward"] > 3
    code, out, err = run(*args, "--draft", tiny)
    assert code == 0 and out.rstrip().endswith(plain["text"].rstrip()) and "tokens a forward" in err
    code, out, err = run(*args, "--prompt", "class A", "--draft", "lookup")
    assert code == 0 and "drafted tokens accepted" in err
    for wrong, words in (
        (("--draft-tokens", 3), "generating without --draft does not read --draft-tokens"),
        (("--draft", "ngram:nowhere.txt"), "no file 'nowhere.txt'"),
        (("--draft", "lookup", "--draft-tokens", 0), "tokens=0"),
        (("--draft", "lookup", "--beams", 2), "a draft for beams=2"),
    ):
        code, _, err = run(*args, *wrong)
        assert code == 2 and words in err


def test_generate_from_codes(run: Run, tiny: Path) -> None:
    args = ("generate", tiny, "--prompt", "def f", "--max-new-tokens", 8, "--temperature", 0, "--json")
    model = dt.load(tiny)
    quantise(model, "int4")
    expected = dt.generate(model, dt.load_tokenizer(tiny), "def f", max_new_tokens=8, temperature=0)
    code, out, _ = run(*args, "--storage", "int4")
    assert code == 0 and last(out)[0]["text"] == expected
    code, _, err = run(*args, "--storage", "int5")
    assert code == 2 and "int5" in err


def test_a_prompt_beyond_the_context_is_refused(run: Run, tiny: Path) -> None:
    code, _, err = run("generate", tiny, "--prompt", "x = 1\n" * 200, "--temperature", 0)
    assert code == 2 and "64" in err


def test_generated_text_is_printed_as_it_is(run: Run, tiny: Path) -> None:
    prompt = "def f(x):\n\treturn :fire: [red]" + " + x" * 40
    model, tokenizer = dt.load(tiny), dt.load_tokenizer(tiny)
    short = prompt[:30]
    texts = dt.generate(model, tokenizer, [short, "class A"], max_new_tokens=20, temperature=0)
    args = ("generate", tiny, "--temperature", 0, "--max-new-tokens", 20, "--prompt", short)
    assert run(*args)[1] == short + texts[0] + "\n"
    assert run(*args, "--prompt", "class A")[1] == f"{short}{texts[0]}\nclass A{texts[1]}\n"
    wide = ("generate", tiny, "--beams", 2, "--max-new-tokens", 2, "--prompt", "x" * 30 + "\t:fire:")
    code, out, err = run(*wide)
    assert code == 0 and out.startswith("x" * 30 + "\t:fire:"), err  # beams are not drawn unless asked to be


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("generate", "TINY", "--prompt", "y", "--top-p", "7"), "top_p"),
        (("generate", "TINY", "--prompt", "y", "--beams", "2", "--temperature", "1"), "search or draw"),
        (("generate", "TINY", "--prompt", "\udcff\udcfe"), "not UTF-8"),
        (("generate", "TINY", "--prompt", "y" * 300), "context"),
        (("generate", "TINY", "--prompt", "y", "--dtype", "int8"), "int8"),
        (("generate", "TINY", "--prompt", "y", "--device", "banana"), "no device 'banana' here"),
        (("eval", "TINY", "--text", "TEXT", "--device", "meta"), "no device 'meta' here"),
        (("eval", "TINY", "--text", "TEXT", "--device", "cpu:7"), "no device 'cpu:7' here"),
        (("eval", "TINY", "--text", "TEXT", "--length", "0"), "--length"),
        (("eval", "TINY", "--text", "TEXT", "--stride", "-1"), "--stride"),
        (("eval", "TINY", "--text", "TEXT", "--ngram-order", "2"), "does not read --ngram-order"),
        (("show", "TINY", "--dtype", "float32"), "does not read --dtype"),
        (("show", "TINY", "--device", "cpu"), "does not read --device"),
        (("show", "TINY", "--plan", "--device", "tpu"), "'tpu'"),
        (("show", "TINY", "--plan", "--dtype", "nonsense"), "'nonsense'"),
        (("show", "TWICE"), "'dim' stands twice"),
        (("swap", "TINY", "blocks.*.mixer.kv_heads=2", "--out", "TEXT"), "is a file"),
        (("swap", "TINY", "blocks.*.mixer.kv_heads=2", "--out", "TEXT/below"), "which is a file"),
        (("swap", "TINY", "blocks.*.mixer.kv_heads=2", "--out", "OUT", "--format", "hg"), "no format 'hg'"),
        (("swap", "TINY", "--extract", "TINY", "--rank", "2", "--out", "TEXT"), "is a file"),
        (("swap", "TINY", "--extract", "TINY", "--rank", "2", "--out", "OUT", "--format", "hg"), "no format 'hg'"),
        (("adapt", "TINY", "--merge", "nowhere", "--out", "TEXT"), "is a file"),
        (("compare", "recipes/first.yaml", "--out", "TEXT"), "is a file"),
    ],
)
def test_options_are_refused_before_the_work(
    run: Run, tiny: Path, text: Path, tmp_path: Path, monkeypatch: Any, args: tuple[str, ...], says: str
) -> None:
    """Nothing is measured, and nothing printed."""
    twice = tmp_path / "twice.yaml"
    twice.write_text("kind: decoder\nvocab: 8\ndim: 8\ndim: 16\n")
    words = {"TINY": tiny, "TEXT": text, "OUT": tmp_path / "out", "TWICE": twice, "TEXT/below": text / "below"}

    def works(*_: Any, **__: Any) -> None:
        raise AssertionError("it began")

    for name in ("swap.swap", "compare.compare", "evaluate.evaluate"):
        monkeypatch.setattr(import_module("dovetail.report." + name.split(".")[0]), name.split(".")[1], works)
    monkeypatch.setattr("dovetail.adapters.extract", works)
    monkeypatch.chdir(ROOT)
    code, out, err = run(*(words.get(a, a) for a in args))
    assert code == 2 and says in err and out == "", err
    assert not (tmp_path / "out").exists()


def test_eval_gives_nats_and_perplexity(run: Run, tiny: Path, text: Path) -> None:
    code, out, _ = run("eval", tiny, "--text", text, "--json")
    data = last(out)
    assert code == 0
    assert data["perplexity"] == pytest.approx(torch.tensor(data["nats_per_token"]).exp().item(), rel=1e-4)
    assert run("eval", tiny, "--text", "nowhere.txt")[0] == 2


def test_swap_writes_a_model_that_loads_in_transformers(run: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "yarn"
    code, printed, _ = run(
        "swap", tiny, "blocks.*.mixer.position={kind: yarn, factor: 4}", "--out", out, "--text", text
    )
    assert code == 0 and "yarn" in printed, (printed, _)
    config = json.loads((out / "config.json").read_text())
    assert config["rope_scaling"]["rope_type"] == "yarn" and config["rope_scaling"]["factor"] == 4.0
    from transformers import AutoModelForCausalLM

    theirs, ours = AutoModelForCausalLM.from_pretrained(out).float().eval(), dt.load(out, dtype="float32")
    tokens = torch.randint(0, ours.spec.vocab, (1, 80))
    with torch.no_grad():
        a, b = ours(tokens).logits, theirs(tokens).logits
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_swap_heals_by_a_small_training(run: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    how = tmp_path / "heal.yaml"
    how.write_text(
        f"data: {{kind: text, path: {text}}}\ntrain: {{steps: 2, batch: 2, length: 16, lr: 1.0e-3, warmup: 1}}\n"
    )
    args = ("swap", tiny, "blocks.*.mixer.kv_heads=2", "--text", text, "--json")
    code, out, err = run(*args, "--out", tmp_path / "a", "--heal", how)
    assert code == 0, err
    names = [column["name"] for column in last(out)["columns"]]
    assert {"after", "after, healed", "rival", "rival, healed"} <= set(names)
    plain = run(*args, "--out", tmp_path / "b")
    assert plain[0] == 0
    healed, unhealed = dt.load(tmp_path / "a"), dt.load(tmp_path / "b")
    assert any(not torch.equal(p, q) for p, q in zip(healed.parameters(), unhealed.parameters(), strict=True))
    how.write_text("data: {kind: text, path: x}\ntrane: {}\n")
    code, _, err = run(*args, "--out", tmp_path / "c", "--heal", how)
    assert code == 2 and "did you mean 'train'?" in err


def test_swap_to_linear_attention(run: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    args = ("swap", tiny, "blocks.*.mixer={kind: linear}", "--text", text, "--out", tmp_path / "a", "--json")
    code, out, err = run(*args)
    data = last(out)
    assert code == 0 and data["format"] == "dovetail", err
    assert [column["name"] for column in data["columns"]] == ["before", "after", "rival"]
    assert data["rival"] == "random re-initialisation, of equal size, of what the swap only approximates"
    assert not data["reinitialised"] and not data["dropped"]
    assert {m["exactness"] for m in data["moves"]} == {"approximate"}
    there, swapped = dt.load(tiny), dt.load(tmp_path / "a")
    assert swapped.spec.blocks[1].mixer.heads == 4 and swapped.spec.blocks[1].mixer.kind == "linear"
    assert torch.equal(swapped.blocks[1].mixer.qkv.weight, there.blocks[1].mixer.qkv.weight)
    page = (tmp_path / "a" / "swap-report.html").read_text()
    assert "linear in place of attention" in page
    code, out, err = run("generate", tmp_path / "a", "--prompt", "def f", "--max-new-tokens", 3, "--temperature", 0)
    assert code == 0, err


def test_swap_that_no_published_layout_can_say(run: Run, tiny: Path, tmp_path: Path) -> None:
    change = "blocks.1.mixer={kind: lstm}"
    code, _, err = run("swap", tiny, change, "--out", tmp_path / "a")
    assert code == 2 and "nothing of the mixer at blocks.1.mixer can be carried" in err and "fresh" in err
    change = (change, "--fresh", "blocks.1.mixer")
    code, out, _ = run("swap", tiny, *change, "--out", tmp_path / "a", "--json")
    assert code == 0 and last(out)["format"] == "dovetail", _
    assert dt.load(tmp_path / "a").spec.blocks[1].mixer.kind == "lstm"
    code, _, err = run("swap", tiny, *change, "--out", tmp_path / "b", "--format", "hf")
    assert code == 2 and "cannot say" in err and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("blocks.*.mixr.kv_heads=2", "did you mean 'mixer'?"),
        ("blocks.9.mixer.kv_heads=2", "matches none of 2"),
        ("blocks.*.mixer.kv_heads=3", "kv_heads must divide heads"),
        ("blocks.*.mixer.position={kind: rop}", "did you mean 'rope'?"),
        ("position={kind: rope}", "rope"),
        ("blocks.*.mixer={kind: s4}", "no map leads from 'attention' to 's4'"),
        ("blocks.*.mixer={kind: nystrom}", "a nystrom mixer in a causal place"),
        ("blocks.*.mixer={kind: linear, heads: 2, kv_heads: 2}", "leave its heads out"),
        ("blocks.*.mixer={kind: latent}", "give rank"),
    ],
)
def test_swaps_that_cannot_be(run: Run, tiny: Path, tmp_path: Path, change: str, says: str) -> None:
    code, _, err = run("swap", tiny, change, "--out", tmp_path / "x")
    assert code == 2 and says in err and "Traceback" not in err


def test_swaps_around_and_inside_a_position(run: Run, tiny: Path, tmp_path: Path) -> None:
    """A path said twice is refused; what goes inside another part has a path of its own. Prompts then have no end."""
    position = "blocks.*.mixer.position"
    inside = "={kind: rerope, window: 8}"
    code, _, err = run("swap", tiny, f"{position}=logn", position + inside, "--out", tmp_path / "a")
    assert code == 2 and "given twice" in err
    code, _, err = run("swap", tiny, f"{position}=logn", f"{position}.position{inside}", "--out", tmp_path / "a")
    assert code == 0, err
    model = dt.load(tmp_path / "a")
    old = dt.load(tiny).spec.blocks[0].mixer.position
    assert model.spec.blocks[0].mixer.position.position.theta == old.theta
    prompt = "x = 1 # and so on\n" * 40
    code, _, err = run("generate", tmp_path / "a", "--prompt", prompt, "--max-new-tokens", "2", "--temperature", "0")
    assert code == 0, err
    code, _, err = run("generate", tiny, "--prompt", prompt, "--max-new-tokens", "2", "--temperature", "0")
    assert code == 2 and "context" in err


def test_train_stops_on_a_typo_and_trains(run: Run, tmp_path: Path) -> None:
    code, _, err = run("train", ROOT / "recipes/tiny.yaml", "train.stepz=3", f"out={tmp_path}/a")
    assert code == 2 and "did you mean 'steps'?" in err
    code, out, _ = run(
        "train", ROOT / "recipes/tiny.yaml", "train.steps=2", "train.batch=2", "train.length=32", "train.eval_every=0",
        "train.eval_batches=1", f"out={tmp_path}/a", "--json",
    )  # fmt: skip
    assert code == 0 and last(out)["steps"] == 2
    assert run("generate", f"{tmp_path}/a", "--prompt", "def", "--max-new-tokens", 2, "--temperature", 0)[0] == 0


def test_compare_of_some_arms(run: Run, tmp_path: Path) -> None:
    asks = tmp_path / "asks.yaml"
    asks.write_text("arms: [{name: a}]\n")
    code, _, err = run("compare", asks, "--only", "a", "--jobs", 2)
    assert code == 2 and "a recipe whose arms do not train does not read --jobs, --only" in err
    for recipe, near in (("init.yaml", "'deepnorm 54'"), ("length_cpu.yaml", "'linear'")):
        code, _, err = run("compare", ROOT / "recipes" / recipe, "--only", f"{near[1:-1]}_", "--out", tmp_path / "out")
        assert code == 2 and f"did you mean {near}?" in err and not (tmp_path / "out").exists()


def test_a_directory_that_is_not_there(run: Run) -> None:
    code, _, err = run("show", "./nowhere")
    assert code == 2 and "nowhere" in err
    with pytest.raises(CheckpointError):
        run("show", "./nowhere", "--debug")


def test_a_users_own_part_registers_by_import(run: Run, tmp_path: Path) -> None:
    mine = tmp_path / "my_parts.py"
    mine.write_text(
        "import torch\nfrom dovetail.parts.activation import Activation\nfrom dovetail.spec import register\n\n"
        '@register("activation", "test_softsign", oracle="torch.nn.Softsign", source="Bergstra et al. 2009")\n'
        "class Softsign(Activation):\n"
        '    """x / (1 + |x|)."""\n\n'
        "    def function(self, x):\n        return torch.nn.functional.softsign(x)\n"
    )
    try:
        code, out, _ = run("list", "activation", "--json", "--import", mine)
        assert code == 0 and "test_softsign" in {p["kind"] for p in last(out)["activation"]}
        model = dt.build(
            {
                "kind": "decoder",
                "vocab": 8,
                "dim": 8,
                "depth": 1,
                "blocks": {"feedforward": {"kind": "glu", "activation": "test_softsign"}},
            }
        )
        assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 8)
    finally:
        from dovetail.spec import registry

        registry._ENTRIES["activation"].pop("test_softsign", None)
    assert run("list", "--import", tmp_path / "none.py")[0] == 2
