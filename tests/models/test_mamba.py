"""Mamba against transformers, on random small configurations."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dovetail as dt
from dovetail.errors import ConfigError
from dovetail.models.config import ConfigReader
from dovetail.models.mamba import keymap, read, write
from dovetail.models.resolve import resolved
from oracles import oracle_for

TOKENS = torch.randint(1, 29, (2, 11), generator=torch.Generator().manual_seed(3))
# A published checkpoint's: state-spaces/mamba-130m-hf, old copies of its sizes and all.
PUBLISHED = {
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536, "d_model": 768,
    "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 768,
    "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
    "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0, "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {}, "state_size": 16,
    "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
    "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0",
    "use_bias": False, "use_cache": True, "use_conv_bias": True, "vocab_size": 50280,
}  # fmt: skip


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    return small(
        hidden_size=draw(st.sampled_from([6, 20])),
        state_size=draw(st.sampled_from([1, 4])),
        num_hidden_layers=draw(st.integers(1, 3)),
        expand=draw(st.sampled_from([1, 2])),
        conv_kernel=draw(st.sampled_from([2, 4])),
        use_bias=draw(st.booleans()),
        use_conv_bias=draw(st.booleans()),
        hidden_act=draw(st.sampled_from(["silu", "gelu"])),
        time_step_rank=draw(st.sampled_from(["auto", 3])),
        tie_word_embeddings=draw(st.booleans()),
    )


def small(**changes: Any) -> dict[str, Any]:
    return {"vocab_size": 29, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 2} | changes


def peer(config: dict[str, Any], folder: Path) -> Any:
    """In fp32: theirs computes A and dt in that whatever the model's dtype is."""
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(**config))
    peers.randomise(model).save_pretrained(folder)
    return model.eval()


@oracle_for("mixer", "mamba")
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(config=configs())
def test_equals_transformers(config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        theirs = peer(config, Path(name, "in"))
        ours = dt.load(Path(name, "in"))
        peers.check_round_trip(ours, Path(name, "in"), Path(name, "out"))
        peers.check_decoding(ours, TOKENS, 2e-5)
        peers.check_padding(ours, TOKENS, 2e-5)
        peers.check_packing(ours, TOKENS, 2e-5)
        peers.check_training(ours, theirs, {"tokens": TOKENS}, {"input_ids": TOKENS}, 1e-4)


def test_starts() -> None:
    """Of the recurrence: transformers' (which are its authors'), value for value or by their ranges."""
    from transformers import MambaConfig, MambaForCausalLM

    theirs: Any = MambaForCausalLM(MambaConfig(**small(hidden_size=64))).backbone.layers[0].mixer
    wanted = {"kind": "decoder", "vocab": 29, "dim": 64, "depth": 1, "init": "lecun"}
    told = {"kind": "mamba", "state": 4}
    ours: Any = dt.build(wanted | {"blocks": {"mixer": told, "feedforward": None}}).blocks[0].mixer
    assert torch.equal(ours.A_log, theirs.A_log) and torch.equal(ours.D, theirs.D)
    assert torch.equal(ours.conv.bias, theirs.conv1d.bias)
    for mine, other, bound in ((ours.conv, theirs.conv1d, 4**-0.5), (ours.dt, theirs.dt_proj, 4**-0.5)):
        assert 0.9 * bound < mine.weight.abs().max() <= bound and 0.9 * bound < other.weight.abs().max() <= bound
    for steps in (torch.nn.functional.softplus(bias).log() for bias in (ours.dt.bias, theirs.dt_proj.bias)):
        ends = torch.tensor([1e-3, 0.1]).log()
        assert ends[0] - 1e-3 < steps.min() < ends[0] + 0.4 and ends[1] - 0.4 < steps.max() < ends[1] + 1e-3
        assert abs(steps.mean() - ends.mean()) < 5 * (ends[1] - ends[0]) / (12 * 128) ** 0.5  # 128 draws, log-uniform
    slow: Any = dt.build(wanted | {"blocks": {"mixer": told | {"decay": 0.01}, "feedforward": None}}).blocks[0].mixer
    torch.testing.assert_close(slow.A_log.exp(), torch.full((128, 4), 0.01))
    assert all(torch.equal(p, q) for (n, p), q in zip(slow.named_parameters(), ours.parameters()) if n != "A_log")


def test_generation(tmp_path: Path) -> None:
    """Greedy, from a prompt, token for token."""
    theirs = peer(small(hidden_size=16), tmp_path)
    told = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = theirs.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **told)[:, TOKENS.shape[1] :]
    ours = dt.generate(dt.load(tmp_path), None, TOKENS, max_new_tokens=20, temperature=0.0)
    assert torch.equal(torch.as_tensor(ours), wanted)


def test_a_long_row_in_several_chunks(tmp_path: Path) -> None:
    theirs, tokens = peer(small(), tmp_path), torch.randint(1, 29, (1, 150))
    ours = dt.load(tmp_path)
    peers.check_training(ours, theirs, {"tokens": tokens}, {"input_ids": tokens}, 1e-4)


def test_published_config() -> None:
    """Every tensor of the published model has its place, and the config comes back as it is."""
    spec = read(ConfigReader(PUBLISHED))
    reader = ConfigReader({key: value for key, value in PUBLISHED.items() if key != "model_type"})
    assert read(reader) == spec
    reader.finish()
    model = dt.build(spec, weights=False)
    mixer = ["A_log", "D", "conv1d.bias", "conv1d.weight", "dt_proj.bias", "dt_proj.weight", "in_proj.weight"]
    mixer += ["out_proj.weight", "x_proj.weight"]
    names = [f"backbone.layers.{i}.mixer.{n}" for i in range(24) for n in mixer]
    names += [f"backbone.layers.{i}.norm.weight" for i in range(24)]
    names += ["backbone.embeddings.weight", "backbone.norm_f.weight"]
    found = keymap(spec, names, PUBLISHED)
    assert found.stored_names() == set(names)
    assert {t for rule in found.moving for t in rule.names[1]} == {n for n, _ in model.named_parameters()}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert shapes["blocks.23.mixer.choose.weight"] == (48 + 32, 1536)
    assert write(spec, PUBLISHED) == PUBLISHED
    assert resolved(read(ConfigReader(write(spec, {})))) == resolved(spec)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"intermediate_size": 40}, "intermediate_size"),
        ({"time_step_rank": "full"}, "time_step_rank"),
        ({"use_bcdt_rms": True}, "use_bcdt_rms"),
        ({"hidden_act": "softplus"}, "hidden_act"),
    ],
)
def test_what_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    peer(small(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=named):
        dt.load(tmp_path)


def test_what_the_layout_cannot_say(tmp_path: Path) -> None:
    model = dt.build(
        {
            "kind": "decoder",
            "vocab": 29,
            "dim": 8,
            "blocks": {"mixer": {"kind": "mamba", "hidden": 12}, "feedforward": None},
        }
    )
    with pytest.raises(ConfigError, match="hidden width of 12"):
        write(model.spec, {})
    with pytest.raises(ConfigError, match="feedforward"):
        write(model.spec.replace(blocks=[{"mixer": "mamba"}] * 2), {})
    with pytest.raises(ConfigError, match="decay"):
        write(model.spec.replace(blocks=[{"mixer": {"kind": "mamba", "decay": 0.5}, "feedforward": None}] * 2), {})
