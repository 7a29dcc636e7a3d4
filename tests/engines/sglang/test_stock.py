"""Three defects of SGLang's own NVFP4 classes (0.5.23), each beside ours on the same layers, loader and updater.

SGLang's linear class runs without a GPU up to its kernel: its platform is said to be Blackwell, and ``Tensor.cuda`` is left out.
The second defect is in test_updates.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sglang", reason="SGLang is not installed: make test-sglang")

from tests.nvfp4.test_linear import tensors


class Layers(nn.Module):
    """Two linear layers of SGLang's quantization method, loaded as its models are."""

    def __init__(self, method: Any, n: int, k: int) -> None:
        super().__init__()
        self.a, self.b = nn.Module(), nn.Module()
        for layer in (self.a, self.b):
            layer.quant_method = method
            method.create_weights(layer, k, [n], k, n, torch.bfloat16, weight_loader=load)
        self.shape = (n,), k

    def load_weights(self, named: Any) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in named:
            parameters[name].weight_loader(parameters[name], tensor)

    def source(self, prefix: str, seed: int) -> list[tuple[str, Tensor]]:
        return [(f"{prefix}.{name}", tensor) for name, tensor in tensors(*self.shape, seed=seed).items()]


def load(parameter: Any, value: Tensor) -> None:
    parameter.data.copy_(value)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> None:
    from .folders import moe
    from .runner import started

    started(moe(tmp_path_factory.mktemp("stock") / "a", 0))


@pytest.fixture
def classes(process: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    from sglang.srt.layers.quantization import modelopt_quant
    from sglang.srt.plugins import load_plugins

    from aliasparam_nvfp4.integrations.sglang.linear import AliasedFp4LinearMethod

    load_plugins()
    monkeypatch.setattr(modelopt_quant, "get_platform", lambda: SimpleNamespace(is_blackwell=True))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setenv("ALIASPARAM_NVFP4_BACKEND", "flashinfer_cutlass")
    config = modelopt_quant.ModelOptFp4Config(True, "auto", 16, [], {}, use_per_token_activation=False)
    stock = object.__new__(modelopt_quant.ModelOptFp4LinearMethod)
    type(stock).__init__.__wrapped__(stock, config)
    ours = modelopt_quant.ModelOptFp4LinearMethod(config)
    assert type(ours) is AliasedFp4LinearMethod and type(stock) is modelopt_quant.ModelOptFp4LinearMethod
    yield SimpleNamespace(stock=stock, ours=ours)


def updater(model: nn.Module) -> Any:
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    return WeightUpdater(
        tp_rank=0, device="cpu", gpu_id=0, model_config=None, custom_weight_loaders={}, get_model=lambda: model,
        update_model_fields=lambda *a, **k: None, recapture_cuda_graph=lambda: None, get_model_runner=lambda: None,
    )  # fmt: skip


def loaded(method: Any, n: int, k: int) -> Layers:
    model = Layers(method, n, k)
    model.load_weights([*model.source("a", 0), *model.source("b", 1)])
    for layer in (model.a, model.b):
        method.process_weights_after_loading(layer)
    return model


def kernel_scales(layer: nn.Module) -> Tensor:
    return layer.weight_scale_interleaved.detach().clone().view(torch.uint8)


def partial_session(model: Layers) -> None:
    """New weights for ``a`` alone."""
    update = updater(model)
    update.begin_weight_update()
    update.load_weights_from_distributed(model.source("a", 2))
    update.end_weight_update(run_post_load=False)


def test_a_partial_session_swizzles_the_stock_class_twice(classes: SimpleNamespace) -> None:
    """Defect 1: the layer that got nothing has other scales afterwards."""
    stock, ours = loaded(classes.stock, 128, 64), loaded(classes.ours, 128, 64)
    assert torch.equal(kernel_scales(stock.b), kernel_scales(ours.b))  # one format
    before = kernel_scales(ours.b)
    partial_session(stock)
    partial_session(ours)
    assert not torch.equal(kernel_scales(stock.b), before)
    assert torch.equal(kernel_scales(ours.b), before)
    assert torch.equal(kernel_scales(ours.a), kernel_scales(stock.a))  # what was sent is right in both


def test_a_padded_layer_of_the_stock_class_cannot_be_loaded_again(classes: SimpleNamespace) -> None:
    """Defect 3: K is padded from 48 to 64, and the Parameter with it."""
    stock, ours = loaded(classes.stock, 96, 48), loaded(classes.ours, 96, 48)
    with pytest.raises(RuntimeError, match="must match"):
        stock.load_weights(stock.source("a", 2))
    ours.load_weights(ours.source("a", 2))
    classes.ours.process_weights_after_loading(ours.a)
    fresh = Layers(classes.ours, 96, 48)
    fresh.load_weights([*fresh.source("a", 2), *fresh.source("b", 1)])
    for layer in (fresh.a, fresh.b):
        classes.ours.process_weights_after_loading(layer)
    for name in ("weight_prepared", "weight_scale_interleaved", "alpha"):
        assert torch.equal(getattr(ours.a, name).view(torch.uint8), getattr(fresh.a, name).view(torch.uint8))


def test_fp8_layers_of_a_mixed_checkpoint_stay_sglangs(classes: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    """And where one is beside ours, updates are SGLang's own flow, which the log says."""
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.quantization import modelopt_quant

    from aliasparam_nvfp4.integrations.sglang.models import is_ours

    layers = {"a": {"quant_algo": "NVFP4", "group_size": 16}, "b": {"quant_algo": "FP8"}}
    config = modelopt_quant.ModelOptMixedPrecisionConfig.from_config(
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "packed_modules_mapping": {}}
    )
    model = nn.ModuleList([nn.Module(), nn.Module()])
    for layer, prefix in zip(model, layers, strict=True):
        layer.quant_method = config.get_quant_method(object.__new__(LinearBase), prefix)
    assert type(model[0].quant_method) is type(classes.ours)
    assert type(model[1].quant_method) is modelopt_quant.ModelOptFp8LinearMethod
    assert is_ours(model[:1]) and not is_ours(model)
    assert "updates are SGLang's own, and no transactions, beside ModelOptFp8LinearMethod" in caplog.text


def test_kernels_that_have_no_build_here_raise() -> None:
    import sgl_kernel

    if not hasattr(sgl_kernel, "__file__") or "stub" not in str(sgl_kernel.__file__):
        pytest.skip("the real package is here")
    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.fp8_scaled_mm has no build"):
        sgl_kernel.fp8_scaled_mm(torch.ones(2, 2))


@pytest.mark.parametrize(("plugins", "version"), [("none", ""), ("", "0.6.0")])
def test_a_process_without_the_plugin_says_so(plugins: str, version: str) -> None:
    """Left out by the user, or in a version that is not known: SGLang's own classes are untouched, and a line says why."""
    code = f"""
from aliasparam_nvfp4.integrations.plugins import Engine, SGLANG
from aliasparam_nvfp4.integrations.sglang import check, plugin
if {version!r}:
    Engine.installed = lambda self: {version!r}
print(len(plugin.hooks()) - len(check.missing_hooks()), SGLANG.verdict())
"""
    environment = os.environ | ({"SGLANG_PLUGINS": plugins} if plugins else {})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    hooked, _, verdict = done.stdout.strip().splitlines()[-1].partition(" ")
    assert hooked == "0"
    assert ("leaves the plugin" if plugins else "0.6.0 is not 0.5.23 or later") in verdict
    assert plugins or "aliasparam_nvfp4 is not in place: SGLang 0.6.0" in done.stdout + done.stderr
