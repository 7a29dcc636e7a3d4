"""Experts which the files hold fused, by columns and with biases: gpt-oss, as ModelOpt exports it.

The files' names and shapes are transformers' own (``gate_up_proj`` u8 ``[E, H/2, 2I]``, gate and up as neighbouring columns),
with scales beside them. While the model loads, this module holds placeholders under those names, which the loader fills; then it
makes the aliased storage, whose layouts begin with "columns to rows", and shows it under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from aliasparam import registry_of
from aliasparam.host import HOST

from ...checkpoint import TensorEntry, UnsupportedFormatError
from ...checkpoint.format import MODELOPT, CheckpointFormat
from ...checkpoint.scheme import Scheme
from ...moe import GPT_OSS, ExpertActivation, NvFp4MoEMethod, Stored
from ...moe.declarations import Declared, try_out
from ...moe.runners import MoEShape
from ...quantize.global_scale import need_stored_scales
from ...quantize.missing import is_dynamic
from .choice import ExpertChoice

#: Names of the method to those of the files.
FILES = {
    "w13_weight": "gate_up_proj",
    "w2_weight": "down_proj",
    **{f"w13_{name}": f"gate_up_proj_{name}" for name in ("weight_scale", "weight_scale_2", "input_scale", "bias")},
    **{f"w2_{name}": f"down_proj_{name}" for name in ("weight_scale", "weight_scale_2", "input_scale", "bias")},
}


class FusedExperts(nn.Module):
    """``forward(hidden_states [T, H], router_indices [T, k], routing_weights [T, k]) -> [T, H]``.

    Args:
        sizes: (experts, H, I).
        stored: the files' tensors by the names of :data:`FILES`.
        scheme: NVFP4 with activations quantized, or weights alone.
        activation: what lies between the two GEMMs.
        choice: with what they are served.
        dtype: of activations and biases.
    """

    def __init__(
        self,
        sizes: tuple[int, int, int],
        stored: Mapping[str, TensorEntry],
        *,
        scheme: Scheme,
        activation: ExpertActivation,
        choice: ExpertChoice,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.scheme, self._sizes, self._dtype = scheme, sizes, dtype
        form = _form(stored, sizes[0])
        quantized, missing = scheme.inputs == "stored", choice.missing_input_scale
        #: A policy is needed where activations are quantized: of weights alone nothing is missing.
        self.quant_method = NvFp4MoEMethod(
            choice.runner,
            activation=activation,
            input_scale=quantized,
            missing_input_scale=missing if quantized else "refuse",
            bias=True,
            stored=form,
        )
        experts, hidden, intermediate = sizes
        shape = MoEShape(experts, hidden, intermediate, 0, experts, expert_activation=activation)
        declared = Declared(shape, stored=form, input_scale=quantized, bias=dtype)
        for name, (dims, element) in declared.parameters().items():
            file = FILES[name]
            if quantized and is_dynamic(missing) and name.endswith("input_scale") and file not in stored:
                continue
            scalar = dims == (1,) and (file not in stored or stored[file].shape in ((), (1,)))
            found = (stored[file].shape if file in stored else ()) if scalar else dims
            self.register_parameter(file, nn.Parameter(torch.empty(found, dtype=element), requires_grad=False))

    def attach(self) -> None:
        """Take the placeholders' values into aliased storage, and show that under the same names."""
        held = {name: p for name, p in self._parameters.items() if p is not None}
        for name in held:
            del self._parameters[name]
        self.create(held[FILES["w13_weight"]].device)
        registry = registry_of(self)
        if registry is None:
            raise AssertionError("create_weights did not declare the layer")
        for name, file in FILES.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                continue
            value = held.pop(file, None)
            with torch.no_grad():
                parameter.zero_() if value is None else parameter.copy_(value.view(parameter.shape))
            view: Tensor = parameter if value is None or value.dim() else parameter.view(())
            registry.show_shards(name, [(nn.Module() if value is None else self, file, view)])
        for file, left_over in held.items():  # see carried.py
            self.register_parameter(file, left_over)

    def create(self, device: torch.device) -> None:
        """Allocate on ``device``, empty."""
        with device:
            self.quant_method.create_weights(self, *self._sizes, self._dtype)

    def check_scales(self, path: str, value: Callable[[str], Tensor]) -> None:
        """Raise ScaleError for scales that no kernel can take, or of which float32 does not hold what will be computed.

        Args:
            path: of this module, for messages.
            value: of the tensor of such a name in the files.
        """
        names = [f for f in FILES.values() if f in self._parameters and f.endswith(("_scale_2", "_input_scale", "_bias"))]
        read = {file: value(file) for file in names}
        method = self.quant_method
        may_lack = not method.input_scale or method.missing_input_scale != "refuse"
        strict = {f: v for f, v in read.items() if not (f.endswith("_bias") or (may_lack and f.endswith("_input_scale")))}
        need_stored_scales(strict, path)
        self._derive(read)

    def _derive(self, values: Mapping[str, Tensor]) -> None:
        declared: Declared = self.__dict__["nvfp4_moe_declared"]
        shapes = {n: found for n, found in declared.parameters().items() if n.endswith(("_scale_2", "input_scale", "bias"))}
        given = {
            n: values[FILES[n]].view(d) if FILES[n] in values else torch.zeros(d, dtype=t, device=HOST)
            for n, (d, t) in shapes.items()
        }
        try_out(declared.derivations(self.__dict__["nvfp4_runner"]), given)

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        return self.quant_method.apply(self, hidden_states, routing_weights.float(), router_indices.int())

    def extra_repr(self) -> str:
        runner = self.__dict__.get("nvfp4_runner", self.quant_method.backend)
        return f"experts, H, I = {self._sizes}, runner={runner.name}, biases"


def _form(stored: Mapping[str, TensorEntry], experts: int) -> Stored:
    """gpt-oss's, with a scale for each expert where the files have that many."""
    each = {name: stored[file].shape == (experts,) for name, file in FILES.items() if file in stored}
    own = [any(each.get(f"{w}_{scale}", False) for w in ("w13", "w2")) for scale in ("weight_scale_2", "input_scale")]
    return replace(GPT_OSS, one_scale=not own[0], one_input_scale=not own[1])


def fused_in_files(
    path: str,
    module: nn.Module,
    tensors: Mapping[str, TensorEntry],
    scheme: Scheme,
    activation: ExpertActivation,
    *,
    names: CheckpointFormat,
    choice: ExpertChoice,
    dtype: torch.dtype,
) -> FusedExperts:
    """What stands in for transformers' ``module``, whose experts the files hold fused.

    Raises:
        UnsupportedFormatError: names of compressed-tensors, or experts to be divided among processes.
    """
    if names != MODELOPT or choice.ranks.size > 1:
        raise UnsupportedFormatError(
            "experts that the files hold fused are taken as ModelOpt exports them, and transformers loads them whole",
            module=path,
            expected="ModelOpt's names, and one process",
            found=f"{names.name}, {choice.ranks.size} processes",
        )
    stored = {file: tensors[f"{path}.{file}"] for file in FILES.values() if f"{path}.{file}" in tensors}
    experts, hidden, rows = module.get_parameter("gate_up_proj").shape
    sizes = experts, hidden, rows // 2
    return FusedExperts(sizes, stored, scheme=scheme, activation=activation, choice=choice, dtype=dtype)
