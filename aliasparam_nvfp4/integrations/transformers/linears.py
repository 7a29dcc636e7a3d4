"""Which of a model's linear layers are put in other hands before it is loaded."""

from __future__ import annotations

import copy
import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.quantizers.quantizers_utils import should_convert_module

from aliasparam import TensorSpec
from aliasparam.host import HOST

from ...checkpoint import CheckpointError, QuantConfig, UnsupportedFormatError
from ...checkpoint.scheme import Scheme
from ...quantize.missing import Missing, is_dynamic
from .fp8 import Fp8Linear
from .modules import Projection, ProjectionKind
from .source import Source


def replace_linears(
    model: Any, config: QuantConfig, source: Source, dtype: torch.dtype, missing: Missing = "refuse"
) -> list[str]:
    """Put :class:`Projection` and :class:`Fp8Linear` in the place of quantized layers; returns those which the config quantizes
    and the files do not.

    Args:
        model: on the meta device.
        config: says which modules are quantized.
        source: the folder; empty for a model that is loaded from something else.
        dtype: of activations.
        missing: what counts for a missing input scale.

    Raises:
        CheckpointError: scales of an FP8 layer that do not divide its weight.
        UnsupportedFormatError: a quantized layer that transformers would convert, of a class that computes something else, or
            whose weight the model's own code takes; a model that divides its weights.
    """
    _need_weights_left_alone(model)
    tied = {name.rpartition(".")[0] for name in getattr(model, "all_tied_weights_keys", None) or ()}
    converted = {name.rpartition(".")[0] for conversion in source.names.conversions for name in conversion.targets}
    theirs, plain = source.modules(), []
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or (name in tied and source.is_absent(name)):
            continue
        scheme = source.scheme_of(config, theirs.get(name, name), name)
        if scheme is None:
            continue
        if source.is_plain(name):
            plain.append(theirs.get(name, name))
            continue
        if name in converted:
            raise UnsupportedFormatError(
                "a quantized layer is stored in another form than transformers has it, and is converted at load",
                module=name,
                found=f"{scheme.algo} in {theirs[name]}",
                remedy="Export the model with this layer left unquantized.",
            )
        _need_weight_left_alone(model, name, scheme)
        if not _is_linear(module):
            raise UnsupportedFormatError(
                "a quantized layer is no plain linear layer: its class computes something of its own",
                module=name,
                expected="x @ weight.T + bias",
                found=type(module).__name__,
                remedy="Export the model with this layer left unquantized.",
            )
        with torch.device("meta"):
            if scheme.is_fp4:
                made: nn.Module = _fp4(name, module, scheme, config, source, dtype, missing)
            else:
                made = _fp8(name, module, scheme, source, dtype)
        model.set_submodule(name, made)
    return plain


def _need_weights_left_alone(model: Any) -> None:
    """Raise UnsupportedFormatError for RWKV that divides the weights of its later layers, in place, and what passes them too."""
    if getattr(model.config, "rescale_every", 0):
        raise UnsupportedFormatError(
            "this model divides weights in place at its first forward, which packed ones do not take, nor reloads",
            module=type(model).__name__,
            expected="rescale_every=0",
            found=f"rescale_every={model.config.rescale_every}",
            remedy="Load it with from_pretrained(folder, rescale_every=0). It computes the same; only float16 may overflow.",
        )


def _need_weight_left_alone(model: Any, name: str, scheme: Scheme) -> None:
    """Raise UnsupportedFormatError for a layer that transformers' quantizers leave out (T5's ``wo``), where the code that calls
    it looks at its weight."""
    parent, _, leaf = name.rpartition(".")
    forward = getattr(inspect.unwrap(type(model.get_submodule(parent)).forward), "__code__", None)
    looks = forward is not None and {leaf, "weight"} <= set(forward.co_names)
    if looks and not should_convert_module(name, list(model._keep_in_fp32_modules or ())):
        raise UnsupportedFormatError(
            "a quantized layer is one that transformers never quantizes: the model's code goes by the dtype of its weight",
            module=name,
            expected="a layer in 16 or 32 bits",
            found=f"{scheme.algo}, and {leaf} kept by {type(model).__name__}._keep_in_fp32_modules",
            remedy="Export the model with this layer left unquantized.",
        )


def _is_linear(module: nn.Linear) -> bool:
    """Whether it computes what ``nn.Linear`` does. Routers and block-diagonal projections are classes of it with a forward of
    their own, which is run on a few values and compared."""
    if type(module).forward is nn.Linear.forward:
        return True
    with torch.no_grad(), HOST, suppress(Exception):
        x, weight = torch.linspace(-2, 2, 10).view(2, 5), torch.linspace(-1, 3, 15).view(3, 5)
        bias = None if module.bias is None else torch.ones(3)
        tried = copy.copy(module)
        tried._parameters = {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
        out = tried(x)
        return out.shape == (2, 3) and torch.allclose(out, functional.linear(x, weight, bias))
    return False


def _fp4(
    name: str, module: nn.Linear, scheme: Scheme, config: QuantConfig, source: Source, dtype: torch.dtype, missing: Missing
) -> Projection:
    """The tensors of its algorithm, and the optional ones which the files have."""
    names = config.tensors
    quantized = scheme.inputs == "stored"
    stored = quantized and not (is_dynamic(missing) and source.folder and f"{name}.{names.input_global}" not in source.tensors)
    awq = f"{name}.pre_quant_scale" in source.tensors
    kind = ProjectionKind(names, bool(stored), missing if quantized else "refuse", awq)
    scalars = {leaf: source.tensors.get(f"{name}.{leaf}") for leaf in (names.weight_global, names.input_global)}
    shapes = {leaf: entry.shape for leaf, entry in scalars.items() if entry is not None and entry.shape in ((), (1,))}
    return Projection(module.in_features, module.out_features, module.bias is not None, dtype, kind, scheme, shapes)


def _fp8(name: str, module: nn.Linear, scheme: Scheme, source: Source, dtype: torch.dtype) -> Fp8Linear:
    scalar = TensorSpec((), torch.float32)
    specs = [e.spec if (e := source.tensors.get(f"{name}.{leaf}")) else scalar for leaf in ("weight_scale", "input_scale")]
    made = Fp8Linear(module.in_features, module.out_features, module.bias is not None, dtype, scheme, *specs)
    if not made.takes(specs[0]) or specs[1].shape not in ((), (1,)):
        raise CheckpointError(
            "scales of an FP8 layer do not fit its weight",
            name=f"{name}: weight_scale, input_scale",
            expected=f"one value, one for each of {module.out_features} rows, or one for each block; one input scale",
            found=f"{specs[0]}, {specs[1]}",
        )
    return made
