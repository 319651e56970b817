"""Prompt-completion pairs: what is learnt of them, how they stand in rows, and the files they come from."""

from __future__ import annotations

import ast
import heapq
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dovetail import hub
from dovetail.data import PairRows, TokenSet, prepare, rows_of, train_tokenizer
from dovetail.data.docstrings import Docstrings, functions
from dovetail.data.pairs import JsonPairs, encode_pairs
from dovetail.data.rows import IGNORED, collate
from dovetail.data.table_to_text import E2E, WebNLG
from dovetail.errors import DataError, SpecError
from dovetail.models import build
from dovetail.spec import Spec
from dovetail.training import fit
from dovetail.training.preflight import preflight
from oracles import oracle_for

ROWS = [{"q": "2+2", "a": "4"}, {"q": "龙", "a": "a dragon"}, {"q": "2+2", "a": "four {4}"}]
XML = """<benchmark><entries><entry category="City" eid="Id1" size="2">
<originaltripleset><otriple>x | y | z</otriple></originaltripleset>
<modifiedtripleset><mtriple>Abilene | isPartOf | Texas</mtriple><mtriple>Texas | area | 1 &amp; 2</mtriple></modifiedtripleset>
<lex comment="good" lid="Id1">Abilene is in Texas.</lex><lex comment="toFix" lid="Id2">Abilne</lex>
<lex comment="" lid="Id3"> It is a place. </lex></entry></entries></benchmark>"""


def jsonl(folder: Path, rows: list[dict[str, Any]], name: str = "pairs.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: Any) -> Any:
    return train_tokenizer(["2+2", "four"], 258, tmp_path_factory.mktemp("bytes"))  # a byte a token


@oracle_for("corpus", "pairs")
def test_templates_are_filled_from_the_fields(tmp_path: Path) -> None:
    path = jsonl(tmp_path, ROWS)
    corpus = Spec.parse("corpus", {"kind": "pairs", "path": path, "prompt": "{{{q}}} ->", "completion": " {a}"})
    assert isinstance(corpus, JsonPairs) and Spec.parse("corpus", corpus.to_dict()) == corpus
    wanted = [("{2+2} ->", " 4"), ("{龙} ->", " a dragon"), ("{2+2} ->", " four {4}")]
    assert list(corpus.pairs()) == wanted
    assert list(corpus.documents()) == [a + b for a, b in wanted]
    plain = [{"prompt": q, "completion": a} for q, a in [("ab", "c"), ("a", "bc")]]
    one, other = (JsonPairs(path=jsonl(tmp_path, [row], f"{i}.jsonl")) for i, row in enumerate(plain))
    assert list(one.documents()) == list(other.documents()) and one.fingerprint() != other.fingerprint()


def test_bad_pairs_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}])
    with pytest.raises(DataError, match=r"empty[\s\S]*pairs.jsonl:2"):
        list(JsonPairs(path=path).pairs())
    with pytest.raises(DataError, match=r"'meaning'[\s\S]*pairs.jsonl:1[\s\S]*prompt, completion"):
        list(JsonPairs(path=path, prompt="{meaning}").pairs())
    for template in ("prompt", "{}", "{a!r}", "{a:>3}", "{a"):
        with pytest.raises(SpecError, match="prompt"):
            Spec.parse("corpus", {"kind": "pairs", "path": path, "prompt": template})
    pairs = {"kind": "pairs", "path": path}
    with pytest.raises(SpecError, match="prompts"):
        Spec.parse("corpus", {"kind": "controlled", "codes": ["A"], "corpora": [pairs]})


def test_labels_are_those_of_the_completion_and_its_end(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "ab", "completion": "xyz"}, {"prompt": "c", "completion": "w"}]
    made = prepare(JsonPairs(path=jsonl(tmp_path, rows)), tokenizer, tmp_path)
    bos, eos = tokenizer.bos_id, tokenizer.eos_ids[0]
    a, b, c, x, y, z, w = (tokenizer.encode(letter, special=False)[0] for letter in "abcxyzw")
    no = IGNORED
    tokens = [bos, a, b, x, y, z, eos, bos, c, w, eos]
    labels = [no, no, x, y, z, eos, no, no, w, eos, no]
    again = prepare(JsonPairs(path=jsonl(tmp_path, rows)), tokenizer, tmp_path)  # from the files
    for tokens_made in (made, again):
        assert isinstance(tokens_made.prompts, np.memmap) and tokens_made.prompts.tolist() == [3, 2]
        packed = rows_of(tokens_made, 12, "documents")
        assert len(packed) == 1 and packed[0].tokens.tolist() == [*tokens, 0]
        assert packed[0].labels.tolist() == [*labels, no]
        assert packed[0].segments.tolist() == [0] * 7 + [1] * 4 + [-1]
        apart = rows_of(tokens_made, 12, "none")
        assert [apart[i].labels.tolist() for i in range(2)] == [labels[:7], labels[7:]]
    tight = PairRows(made, 6)  # the end is a label one beyond the row, and nothing is cut
    assert len(tight) == 2 and tight.cut == 0 and tight[0].labels.tolist() == labels[:6]
    short = PairRows(made, 4)
    assert short.cut == 1 and short[0].tokens.tolist() == [b, x, y, z] and short[0].labels.tolist() == [x, y, z, eos]
    least = PairRows(made, 2)
    assert least.cut == 2 and least[0].tokens.tolist() == [b, x] and least[0].labels.tolist() == [x, y]
    assert [least[1].tokens.tolist(), least[1].labels.tolist()] == [[c, w], [w, eos]]
    Path(made.prompts.filename).write_bytes(b"1234")  # type: ignore[arg-type, union-attr]
    with pytest.raises(DataError, match="do not belong together"):
        TokenSet.open(Path(made.tokens.filename).with_suffix(".json"))  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(2, 16),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_each_completion_is_learnt_once(sizes: list[tuple[int, int]], length: int, packed: bool) -> None:
    prompts, completions = (np.array(x) for x in zip(*sizes, strict=True))
    offsets = np.concatenate([[0], np.cumsum(prompts + completions)])
    tokens = TokenSet(np.arange(offsets[-1], dtype=np.uint16), offsets, {}, prompts.astype(np.uint32))
    rows = PairRows(tokens, length, packed)
    learnt = []
    for i in range(len(rows)):
        row = rows[i]
        assert len(row.tokens) <= length and sum(row.segments >= 0) <= sum(rows[rows.longest()].segments >= 0)
        counts = row.labels != IGNORED
        assert (row.labels[counts] == row.tokens[counts] + 1).all()  # the next id of the same pair
        learnt += row.labels[counts].tolist()
    wanted = []
    for start, before, size in zip(offsets, prompts, completions, strict=False):
        first = start + before if before else start + 1  # nothing stands before the first token of an empty prompt
        fits = size if before else min(size, length + 1) - 1
        wanted += range(first, first + min(fits, length))
    assert learnt == wanted
    assert rows.cut == sum(prompts + completions > length + 1)


def test_pairs_do_not_see_each_other_when_packed(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "ab", "completion": "xyz"}, {"prompt": "c", "completion": "w"}]
    made = prepare(JsonPairs(path=jsonl(tmp_path, rows)), tokenizer, tmp_path)
    spec = Spec.parse("model", {"kind": "decoder", "vocab": 258, "dim": 16, "depth": 2, "context": 12})
    model = build(spec, seed=0).double().eval()
    packed = collate([PairRows(made, 12)[0]])
    apart = collate([PairRows(made, 12, packed=False)[1]])
    together = model(packed["tokens"], segments=packed["segments"]).logits[0, 7:11]
    torch.testing.assert_close(together, model(apart["tokens"]).logits[0], rtol=1e-12, atol=1e-12)


def test_a_fit_learns_completions_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}:", "completion": f" {i * i} times"} for i in range(40)]
    (tmp_path / "some").mkdir()
    corpus, some = ({"kind": "pairs", "path": p} for p in (jsonl(tmp_path, rows), jsonl(tmp_path / "some", rows[:30])))
    recipe = {
        "model": {"kind": "decoder", "dim": 16, "depth": 1},
        "tokenizer": {"train": 280},
        "data": {"train": corpus, "held_out": some, "cache": str(tmp_path / "cache")},
        "train": {"steps": 4, "batch": 2, "length": 32, "lr": 1e-2, "autocast": "none", "device": "cpu"},
        "out": str(tmp_path / "out"),
    }
    for pack in ("documents", "none"):
        result = fit(recipe, [f"data.pack={pack}", f"out={tmp_path / pack}"], progress=False)
        tokenizer = hub.load_tokenizer(tmp_path / pack)
        encoded = encode_pairs(tokenizer, [(row["prompt"], row["completion"]) for row in rows])
        scored = encoded[:30]
        assert result.held_out is not None and result.held_out["tokens"] == sum(len(after) for _, after in scored)
        model: Any = hub.load(tmp_path / pack)
        nats = 0.0
        with torch.no_grad():
            for before, after in scored:
                log_p = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
                nats -= float(log_p[len(before) - 1 : -1].gather(-1, torch.tensor(after)[:, None]).sum())
        assert result.held_out["nats"] == pytest.approx(nats / result.held_out["tokens"], rel=1e-5)
    found = preflight(recipe, ["data.pack=none", "train.length=8"])
    assert found.cut == sum(len(before + after) > 9 for before, after in encoded) > 0
    console = Console(record=True, width=200, force_terminal=True)
    whole = preflight(recipe, ["data.pack=none", "train.batch=1"])
    console.print(whole)
    shown = console.export_text(styles=True)
    assert whole.batch is not None
    green = [p for i, p in enumerate(whole.pieces) if i and whole.batch["labels"][0, i - 1] != IGNORED]
    assert "times" in "".join(green) and "say" not in "".join(green)
    for piece in green:
        assert f"\x1b[32m{piece}\x1b[0m" in shown


@oracle_for("corpus", "e2e")
def test_e2e_from_lines_and_from_the_challenges_csv(tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text(
        "name : Zizzi | eatType : pub||A pub , Zizzi . \nname : Zizzi | eatType : pub||Zizzi || here \n"
    )
    (tmp_path / "dev.csv").write_text(
        'mr,ref\n"name[Zizzi], eatType[pub]","A pub , Zizzi ."\n"name[Zizzi], eatType[pub]",Zizzi || here\n'
    )
    wanted = [
        ("name : Zizzi | eatType : pub |||", " A pub , Zizzi ."),
        ("name : Zizzi | eatType : pub |||", " Zizzi || here"),
    ]
    for name in ("valid.txt", "dev.csv"):
        assert list(E2E(path=str(tmp_path / name)).pairs()) == wanted
    (tmp_path / "bad.txt").write_text("a||b\nc|d\n")
    (tmp_path / "bad.csv").write_text("MR\nname[x]\n")
    (tmp_path / "worse.csv").write_text("mr,ref\nname[x] and more,text\n")
    (tmp_path / "open.csv").write_text('mr,ref\nname[x],"text\n' + "name[x],text\n" * 12_000)
    said = {"bad.txt": "bad.txt:2", "bad.csv": "columns are MR", "worse.csv": "not a meaning", "open.csv": "a quote"}
    for name, message in said.items():
        with pytest.raises(DataError, match=message):
            list(E2E(path=str(tmp_path / name)).pairs())


@oracle_for("corpus", "webnlg")
def test_webnlg_from_a_file_and_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "1triples").mkdir()
    (tmp_path / "1triples" / "City.xml").write_text(XML)
    prompt = "Abilene : isPartOf : Texas | Texas : area : 1 & 2 |||"
    wanted = [(prompt, " Abilene is in Texas."), (prompt, " It is a place.")]
    for path in (tmp_path, tmp_path / "1triples" / "City.xml"):
        assert list(WebNLG(path=str(path)).pairs()) == wanted
    categories = WebNLG(path=str(tmp_path), prompt="{category}: {triples}")
    assert next(categories.pairs())[0] == f"City: {prompt[:-4]}"
    (tmp_path / "1triples" / "broken.xml").write_text("<benchmark>")
    with pytest.raises(DataError, match=r"not XML[\s\S]*broken.xml"):
        list(WebNLG(path=str(tmp_path)).pairs())
    (tmp_path / "2triples").mkdir()
    with pytest.raises(DataError, match="no XML"):
        list(WebNLG(path=str(tmp_path / "2triples")).pairs())


@oracle_for("corpus", "docstrings")
def test_docstrings_are_those_of_the_modules() -> None:
    said = dict(Docstrings(split="held_out").pairs())
    of = inspect.getdoc(heapq.merge)
    (source,) = (s for s in said if s.startswith("def merge(*iterables, key=None, reverse=False):"))
    assert of is not None and said[source] == f" {of.splitlines()[0]}" and of.splitlines()[0] not in source
    wanted = ast.parse(inspect.getsource(heapq.merge)).body[0]
    assert isinstance(wanted, ast.FunctionDef)
    wanted.body.pop(0)
    assert ast.dump(ast.parse(source)) == ast.dump(ast.Module([wanted], []))  # comments are not in a tree
    few = list(Docstrings(limit=7).pairs())
    assert len(few) == 7 and all(text.strip() and source.endswith("\n#") for source, text in few)


def test_functions_that_cannot_be_split_are_left_out() -> None:
    text = (
        'class A:\n    @property\n    async def f(\n        x,\n    ):\n        """\n        Says so.\n\n        More.\n'
        '        """  # noqa\n\n        return x\n\ndef g(): "doc"; return 1\n\ndef h():\n    "doc"\n\n'
        'def i():\n    "one"; return 2\n\ndef j():\n    return 3\n\ndef k():\n    "K."\n    def inner():\n        "In."\n        return 4\n'
    )
    found = list(functions(text))
    assert found[0] == (3, "async def f(\n    x,\n):\n\n    return x", "Says so.")
    assert [(line, said) for line, _, said in found[1:]] == [(25, "K."), (27, "In.")]
