"""Models whose linear layers are held, called or computed otherwise than those of a Llama."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aliasparam import checkpoint_state_dict
from aliasparam_nvfp4.checkpoint import UnsupportedFormatError
from aliasparam_nvfp4.quantize.codec import dequantize, quantize

transformers = pytest.importorskip("transformers")
from aliasparam_nvfp4.integrations.transformers import reload_folder, use_backend  # noqa: E402

IDS = torch.arange(12).view(1, 12)


def llama_config() -> Any:
    return transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip


class Stacked(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """An MLP that runs all its children, of square layers: one child more would not be noticed by shapes."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = nn.Sequential(nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 48))
        self.post_init()


class _Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(48, 48) for _ in range(2))
        self.named = nn.ModuleDict({"gate_proj": nn.Linear(48, 48), "up_proj": nn.Linear(48, 48)})

    def forward(self, x: Tensor) -> Tensor:
        for step in (*self.steps, *self.named.values()):
            x = torch.tanh(step(x))
        return x


class Listed(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """An MLP that goes through lists of layers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = _Listed()
        self.post_init()


class _Reversed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flip(-1)


class Own(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A class of ``nn.Linear`` that computes something of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].mlp.down_proj = _Reversed(80, 48, bias=False)
        self.post_init()


class _Written(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        out = input @ self.weight.T
        return out if self.bias is None else out + self.bias


class Written(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A class of ``nn.Linear`` that computes the same in other words, as Falcon's."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].mlp.down_proj = _Written(80, 48)
        self.post_init()


def bart() -> Any:
    """A tensor of the model beside its base model."""
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=64, d_model=48, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3, decoder_attention_heads=3,
            encoder_ffn_dim=80, decoder_ffn_dim=80, max_position_embeddings=32,
        )
    )  # fmt: skip


STRUCTURES: dict[str, Callable[[], Any]] = {
    "a sequence": lambda: Stacked(llama_config()),
    "lists": lambda: Listed(llama_config()),
    "other words": lambda: Written(llama_config()),
    "a tensor beside the base model": bart,
    "a layer that is kept": lambda: t5(),
    "a gated one": lambda: t5(feed_forward_proj="gated-gelu"),
    "weights that are not divided": lambda: rwkv(rescale_every=0),
}


def t5(**changed: Any) -> Any:
    """A layer whose weight's dtype the model asks for: transformers keeps it as it is."""
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64, d_model=48, d_kv=16, d_ff=80, num_layers=1, num_heads=3, decoder_start_token_id=0, **changed,
        )
    )  # fmt: skip


def rwkv(**changed: Any) -> Any:
    """Weights that a first forward divides, unless it is told not to."""
    return transformers.RwkvForCausalLM(
        transformers.RwkvConfig(
            vocab_size=64, hidden_size=48, attention_hidden_size=48, intermediate_size=80, num_hidden_layers=3, context_length=32,
            **changed,
        )
    )  # fmt: skip


def folders(model: Any, path: Path, plainly: tuple[str, ...] = ("lm_head", "wo")) -> tuple[Path, Path]:
    """(W4A16_NVFP4, the same decoded) of every linear layer but those of some last names."""
    model.save_pretrained(path / "plain")
    plain: dict[str, Tensor] = load_file(path / "plain" / "model.safetensors")
    packed = dict(plain)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in plainly:
            codes, scales, total = quantize(plain[f"{name}.weight"].float(), torch.tensor(2.0 / 2688))
            plain[f"{name}.weight"] = dequantize(codes, scales, total)
            packed |= {f"{name}.weight": codes, f"{name}.weight_scale": scales, f"{name}.weight_scale_2": total.reshape(())}
    config = json.loads((path / "plain" / "config.json").read_text())
    quantization = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": [f"*{name}" for name in plainly]}
    for folder, tensors, more in ((path / "packed", packed, {"quantization_config": quantization}), (path / "plain", plain, {})):
        folder.mkdir(exist_ok=True)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | more))
    return path / "packed", path / "plain"


def out(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits  # type: ignore[no-any-return]


def load(kind: type[Any], folder: Path) -> Any:
    with use_backend("reference"):
        return kind.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_law_1_a_model_computes_what_it_does_with_decoded_weights(structure: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = STRUCTURES[structure]()
    children = {path: len(module) for path, module in made.named_modules() if hasattr(module, "__len__")}
    packed, plain = folders(made, tmp_path)
    model, decoded = load(type(made), packed), type(made).from_pretrained(plain, dtype=torch.float32).eval()

    torch.testing.assert_close(out(model), out(decoded), rtol=1e-4, atol=1e-5)
    assert {path: len(module) for path, module in model.named_modules() if hasattr(module, "__len__")} == children
    before = out(model)
    reload_folder(model, packed)
    assert torch.equal(out(model), before)
    assert checkpoint_state_dict(model).keys() == load_file(packed / "model.safetensors").keys()


def test_law_8_a_quantized_layer_that_computes_something_of_its_own_is_refused(tmp_path: Path) -> None:
    packed, _ = folders(Own(llama_config()), tmp_path)

    with pytest.raises(UnsupportedFormatError, match=r"model\.layers\.1\.mlp\.down_proj: .* no plain linear layer"):
        load(Own, packed)


def test_law_8_a_quantized_layer_whose_dtype_the_model_asks_for_is_refused(tmp_path: Path) -> None:
    packed, _ = folders(t5(), tmp_path, ("lm_head",))

    with pytest.raises(UnsupportedFormatError, match=r"encoder\.block\.0.*\.wo: .* dtype of its weight"):
        load(transformers.T5ForConditionalGeneration, packed)


class _Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x.to(self.down.weight.dtype))  # type: ignore[no-any-return]


class Asking(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """The same in a class that does not say so."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].mlp = _Asking()
        self.post_init()


def test_law_8_activations_in_the_dtype_of_packed_weights_are_refused_by_name(tmp_path: Path) -> None:
    packed, _ = folders(Asking(llama_config()), tmp_path)
    model = load(Asking, packed)

    with pytest.raises(UnsupportedFormatError, match=r"down.*(?s:.*)uint8"):
        out(model)


def test_law_8_a_model_that_divides_its_weights_is_refused_until_it_is_told_not_to(tmp_path: Path) -> None:
    packed, plain = folders(rwkv(rescale_every=2), tmp_path)
    kind = transformers.RwkvForCausalLM

    with pytest.raises(UnsupportedFormatError, match=r"rescale_every=0"):
        load(kind, packed)
    with use_backend("reference"):
        model = kind.from_pretrained(packed, dtype=torch.float32, rescale_every=0).eval()
    divided = kind.from_pretrained(plain, dtype=torch.float32).eval()
    torch.testing.assert_close(out(model), out(divided), rtol=1e-3, atol=1e-4)
    before = out(model)
    with pytest.warns(UserWarning, match="do not change the forward: rescale_every"):
        reload_folder(model, packed)
    assert torch.equal(out(model), before)
