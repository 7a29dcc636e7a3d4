"""A whole model through every linear backend that runs here, against ModelOpt's own dequantization of its files, as SQNR in dB.

The Triton kernels run in their interpreter, in a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aliasparam_nvfp4.linear.backends import linear_backends
from aliasparam_nvfp4.linear.verify import signal_to_noise

transformers = pytest.importorskip("transformers")
pytest.importorskip("modelopt")
from aliasparam_nvfp4.integrations.transformers import reload_folder, use_backend  # noqa: E402

from .interpreter import interpreted  # noqa: E402
from .proofs import proves  # noqa: E402
from .test_checkpoint_kinds import by_modelopt, logits  # noqa: E402

#: In float32, without and with quantized activations. With them an activation on the edge between two codes may fall to the other
#: side by the order of a sum. A forgotten or doubled scale gives less than 3.
WEIGHT_ONLY_DB, QUANTIZED_DB = 100.0, 10.0
RUNNABLE = [b for b in linear_backends().values() if not b.name.startswith("flashinfer_")]


def dequantized(folder: Path, *, quantized: bool) -> Any:
    """The model in float32 with ModelOpt's own decoding of weights and, if ``quantized``, of activations."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    tensors = load_file(folder / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.LlamaForCausalLM(config).float().eval()
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and tensor.dtype is torch.uint8:
            packed = NVFP4QTensor(torch.Size((tensor.shape[0], 2 * tensor.shape[1])), torch.float32, tensor)
            scales = {"scale": tensors[f"{module}.weight_scale"], "double_scale": tensors[f"{module}.weight_scale_2"]}
            state[name] = packed.dequantize(dtype=torch.float32, **scales, block_sizes={-1: 16})
        elif tensor.dtype is torch.bfloat16:
            state[name] = tensor.float()
    assert set(model.load_state_dict(state, strict=False).missing_keys) <= {"lm_head.weight"}
    for name, module in model.named_modules():
        if quantized and f"{name}.input_scale" in tensors:
            module.register_forward_pre_hook(_quantizes(tensors[f"{name}.input_scale"]))
    return model


def _quantizes(scale: Tensor) -> Any:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    def hook(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        rows = args[0].reshape(-1, args[0].shape[-1])
        made, blocks, total = NVFP4QTensor.quantize(rows.clone(), 16, None, scale)
        value = made.dequantize(dtype=torch.float32, scale=blocks, double_scale=total, block_sizes={-1: 16})
        return (value.view(args[0].shape),)

    return hook


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return by_modelopt(tmp_path_factory.mktemp("a"), "NVFP4_DEFAULT_CFG"), by_modelopt(
        tmp_path_factory.mktemp("b"), "NVFP4_DEFAULT_CFG", seed=1
    )


@pytest.fixture(scope="module")
def by_triton(folders: tuple[Path, Path]) -> dict[str, float]:
    """SQNR by Triton backend, all measured in one process: each imports transformers for seconds."""
    pytest.importorskip("triton")
    names = [backend.name for backend in RUNNABLE if backend.name.startswith("triton")]
    printed = interpreted("tests.nvfp4.test_accuracy", *map(str, folders), *names, options=("-W", "ignore"))
    return dict(zip(names, map(float, printed.split()[-len(names) :]), strict=True))


def measure(backend: str, a: Path, b: Path) -> float:
    """SQNR of the model at ``a``; it is reloaded to ``b`` and back, and raises where that is not the cold load bit for bit."""
    with use_backend(backend):
        model, cold = (transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (a, b))
    first = logits(model)
    reload_folder(model, b)
    assert torch.equal(logits(model), logits(cold)), "law 9"
    reload_folder(model, a)
    assert torch.equal(logits(model), first), "A, B, A"
    quantized = not linear_backends()[backend].weight_only
    return signal_to_noise(first, logits(dequantized(a, quantized=quantized)))


def bound(backend: str) -> float:
    return WEIGHT_ONLY_DB if linear_backends()[backend].weight_only else QUANTIZED_DB


@proves("runs", "backend", RUNNABLE)
def test_the_model_is_as_accurate_as_its_bytes_allow_and_reloads_bit_for_bit(
    backend: Any, folders: tuple[Path, Path], by_triton: dict[str, float]
) -> None:
    if not backend.name.startswith("triton"):
        assert measure(backend.name, *folders) >= bound(backend.name)
        return
    assert by_triton[backend.name] >= bound(backend.name)


@pytest.mark.parametrize("backend", [b.name for b in RUNNABLE if not b.needs_input_scale and not b.name.startswith("triton")])
def test_a_checkpoint_without_activation_scales_too(backend: str, tmp_path: Path) -> None:
    folder = by_modelopt(tmp_path / "a", "W4A16_NVFP4_CFG")
    with use_backend(backend):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    assert signal_to_noise(logits(model), logits(dequantized(folder, quantized=False))) >= WEIGHT_ONLY_DB


if __name__ == "__main__":
    print(*(measure(name, Path(sys.argv[1]), Path(sys.argv[2])) for name in sys.argv[3:]))
