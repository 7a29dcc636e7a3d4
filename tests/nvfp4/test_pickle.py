"""Layers are copied and saved whole: every kind pickles, and what comes back serves and reloads."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from aliasparam_nvfp4 import NvFp4LinearMethod

from .moe_experts import ACTIVATIONS, Experts, serving, stored
from .moe_layers import choices, load, names
from .test_linear import Layer, tensors

DIMS = (2, 128, 128)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("runner, kind", [(n, k) for k, a in ACTIVATIONS.items() for n in serving(a)])
def test_experts(runner: str, kind: str, copied: Any) -> None:
    layer = Experts(runner, DIMS, activation=ACTIVATIONS[kind])
    load(layer, stored(DIMS, activation=ACTIVATIONS[kind]))

    other = copied(layer)

    assert other.nvfp4_runner is layer.nvfp4_runner and names(other) == names(layer)
    before = names(layer)
    for one in (other, layer):
        load(one, stored(DIMS, 1, activation=ACTIVATIONS[kind]))
        assert one is layer or names(layer) == before
    assert names(other) == names(layer) != before
    if runner == "reference":
        assert torch.equal(other(*choices(3, 2, 128)), layer(*choices(3, 2, 128)))


@pytest.mark.parametrize("backend", ["reference", "flashinfer_trtllm", "flashinfer_cutedsl_w4a16_sm12x"])
def test_linear_layers(backend: str) -> None:
    layer = Layer(NvFp4LinearMethod(backend), (64, 64), 48, "cpu")
    layer.load_state_dict(tensors((64, 64), 48))
    layer.method.process_weights_after_loading(layer)

    other = pickle.loads(pickle.dumps(layer))

    assert other.nvfp4_backend is layer.nvfp4_backend and names(other) == names(layer)
