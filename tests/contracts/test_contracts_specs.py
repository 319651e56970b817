"""Every skeleton's spec survives JSON, prints as a tree, and is refused where its parts do not fit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from contracts import (
    test_contracts_bart,
    test_contracts_deberta,
    test_contracts_deepseek,
    test_contracts_detr,
    test_contracts_mrope,
    test_contracts_prefix,
    test_contracts_reformer,
    test_contracts_rerope,
    test_contracts_sam,
    test_contracts_swin,
    test_contracts_t5,
)
from dovetail.spec import Spec

SKELETONS: dict[str, tuple[str, Any]] = {
    "bart": ("model", test_contracts_bart.spec()),
    "deberta": ("container", test_contracts_deberta.spec(["c2p", "p2c"], 6, 16)),
    "deepseek": ("model", test_contracts_deepseek.spec(7)),
    "detr": ("container", test_contracts_detr.spec()),
    "mrope": ("model", test_contracts_mrope.spec()),
    "prefix": ("model", test_contracts_prefix.spec()),
    "reformer": ("model", test_contracts_reformer.spec()),
    "rerope": ("mixer", test_contracts_rerope.spec(5)),
    "sam": ("container", test_contracts_sam.spec()),
    "swin": ("container", test_contracts_swin.spec()),
    "t5": ("model", test_contracts_t5.spec(True)),
}


@pytest.mark.parametrize("name", SKELETONS)
def test_spec_survives_json(name: str) -> None:
    category, given = SKELETONS[name]
    spec = Spec.parse(category, given)
    assert Spec.parse(category, json.loads(json.dumps(spec.to_dict()))) == spec
    assert str(spec).startswith(spec.kind)
