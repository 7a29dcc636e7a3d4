"""The modules which stand in for a transformers model's fused experts.

transformers 5 holds the experts of a layer as two fused tensors and loads them by conversions that know nothing of scales. So
NVFP4 experts are kept from its loader: a module without tensors stands in while the model loads, then reads its own ranges from
the folder straight into the storage of :class:`~aliasparam_nvfp4.NvFp4MoEMethod`. The state dict has the checkpoint's names, one
tensor for each expert and projection, each a view of the fused storage (see [Note: fused but shown apart] in modules.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aliasparam import Alias, AliasRegistry, declare, registry_of

from ...checkpoint import CheckpointFolder, ExpertTensors, TensorEntry, UnsupportedFormatError
from ...checkpoint.experts import ExpertKey
from ...checkpoint.format import CheckpointFormat
from ...checkpoint.scheme import Scheme
from ...moe import ExpertActivation, NvFp4MoEMethod
from ...moe.folder import SHARDS, ExpertSource, expert_source, expert_specs, load_from, optional_suffixes
from .activation import by_columns, expert_activation
from .choice import ExpertChoice as ExpertChoice
from .fused_experts import fused_in_files


class Experts(nn.Module):
    """NVFP4 experts of one layer: ``forward(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H]``.

    Args:
        tensors: the layer's experts in the folder that is being loaded.
        sizes: (experts, H, I) of the whole layer.
        names: of the tensors.
        scheme: NVFP4 with activations quantized, or weights alone.
        activation: what lies between the two GEMMs.
        choice: with what they are served.
        dtype: of activations.
    """

    def __init__(
        self,
        tensors: ExpertTensors,
        sizes: tuple[int, int, int],
        *,
        names: CheckpointFormat,
        scheme: Scheme,
        activation: ExpertActivation,
        choice: ExpertChoice,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.quant_method = NvFp4MoEMethod(
            choice.runner,
            checkpoint=names,
            activation=activation,
            input_scale=scheme.inputs == "stored",
            missing_input_scale=choice.missing_input_scale,
            **asdict(choice.ranks),
        )
        tensors = tensors if activation.gated else tensors.without_gate()
        #: What the files call this layer's experts.
        self.layer = tensors.layer
        #: The names of its tensors in the state dict: those of the files it was loaded from.
        self.names = {key: entry.name for key, entry in tensors.entries.items()}
        self._scalars = {key: entry.shape for key, entry in tensors.entries.items() if len(entry.shape) < 2}
        self.ranks = choice.ranks
        self._sizes, self._dtype = sizes, dtype

    def check_headers(self, tensors: ExpertTensors) -> None:
        """Raise CheckpointError where the files' experts are not those of the model."""
        experts, hidden, intermediate = self._sizes
        method, gated = self.quant_method, self.quant_method.activation.gated
        specs = expert_specs(method.checkpoint, hidden, intermediate, input_scale=method.input_scale, gated=gated)
        own = tensors if gated else tensors.without_gate()
        optional = optional_suffixes(method.checkpoint, method.missing_input_scale, input_scale=method.input_scale)
        own.need(experts, specs, optional=optional)

    def create(self, folder: CheckpointFolder, tensors: ExpertTensors, device: torch.device) -> ExpertSource:
        """Allocate on ``device``, empty; where this rank's part lies in ``folder``.

        Raises:
            CheckpointError: see :meth:`~aliasparam_nvfp4.moe.folder.ExpertSource.check`.
            ScaleError: likewise.
        """
        experts, hidden, intermediate = self._sizes
        own, width = self.ranks.divided(experts, intermediate)
        with device:
            self.quant_method.create_weights(self, own, hidden, width, self._dtype)
        source = self.source(folder, tensors)
        source.check()
        return source

    def load(self, folder: CheckpointFolder, tensors: ExpertTensors, device: torch.device) -> None:
        """Read this rank's part, process, and show every expert's tensors. Raises as :meth:`create`."""
        source = self.create(folder, tensors, device)
        load_from(source, self)
        self._show(source)
        self._carry(source, device)

    def source(self, folder: CheckpointFolder, tensors: ExpertTensors) -> ExpertSource:
        """Where this layer's part lies in a folder."""
        return expert_source(self.quant_method, self, folder, tensors)

    def _carry(self, source: ExpertSource, device: torch.device) -> None:
        """Input scales that are not read travel with their projections."""
        read = {part.key for part in source.parts()}
        for key, entry in source.tensors.entries.items():
            if key not in read and key[2] in source.optional:
                value = nn.Parameter(source.folder.read(entry.name).to(device), requires_grad=False)
                _projection(self, entry.name).register_parameter(key[2], value)

    def _show(self, source: ExpertSource) -> None:
        registry = _registry(self)
        shards: dict[str, list[tuple[nn.Module, str, Tensor]]] = {}
        there = [(part.key, _projection(self, part.name), part.key[2]) for part in source.parts()]
        nowhere = [(key, nn.Module(), f"{key[1]}_{key[0]}") for key in source.absent()]
        for key, module, leaf in there + nowhere:
            name = f"{'w2' if key[1] == 'w2' else 'w13'}_{key[2]}"
            shards.setdefault(name, []).append((module, leaf, self._view(self.get_parameter(name), key, source)))
        for name, views in shards.items():
            registry.show_shards(name, views)

    def _view(self, param: Tensor, key: ExpertKey, source: ExpertSource) -> Tensor:
        """One expert's tensor in a fused one, in the shape that the checkpoint has."""
        expert, shard, suffix = key
        row = expert if suffix == source.format.input_global else expert - source.shape.first_expert
        gated = self.quant_method.activation.gated
        if suffix in (source.format.weight_global, source.format.input_global):
            one = param[row : row + 1] if param.dim() == 1 else param[row, 1:] if shard == "w3" else param[row, :1]
            return one.view(self._scalars.get(key, ()))
        return param[row] if shard == "w2" or not gated else param[row].chunk(2)[SHARDS.index(shard)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = self.quant_method.apply(self, hidden_states, top_k_weights.float(), top_k_index.int())
        if self.ranks.size > 1:
            dist.all_reduce(out)
        return out

    def extra_repr(self) -> str:
        runner = self.__dict__.get("nvfp4_runner", self.quant_method.backend)
        return f"experts, H, I = {self._sizes}, runner={runner.name}"


def replace_experts(
    model: nn.Module,
    layers: Mapping[str, ExpertTensors],
    schemes_of: Callable[[str], set[Scheme | None]],
    stored: Mapping[str, TensorEntry],
    names: CheckpointFormat,
    choice: ExpertChoice,
    dtype: torch.dtype,
) -> None:
    """Put :class:`Experts` in the place of the model's quantized experts, before it is loaded.

    Args:
        model: on the meta device.
        layers: experts in the files, by the path of their module in ``model``.
        schemes_of: how all projections of the experts at a path are quantized.
        stored: the files' tensors by the model's names.
        names: of the tensors.
        choice: with what they are served.
        dtype: see :class:`Experts`.

    Raises:
        UnsupportedFormatError: experts of another shape or activation, or quantized in part or otherwise.
    """
    for path, module in list(fused_experts(model)):
        tensors, schemes = layers.get(path), schemes_of(path)
        if schemes == {None}:
            continue
        activation = expert_activation(module)
        scheme = next(iter(schemes))
        if tensors is None and len(schemes) == 1 and scheme and scheme.is_fp4 and activation and by_columns(module):
            made = fused_in_files(path, module, stored, scheme, activation, names=names, choice=choice, dtype=dtype)
            model.set_submodule(path, made)
            continue
        if by_columns(module) or tensors is None or len(schemes) > 1 or scheme is None or not scheme.is_fp4 or activation is None:
            raise UnsupportedFormatError(
                "experts of this kind are not supported",
                module=path,
                expected="all experts NVFP4 or W4A16_NVFP4, each with tensors of its own, without biases, gated by SiLU or GELU "
                "(tanh), or without a gate and of squared ReLU; or those of gpt-oss, fused and with biases",
                found=f"{type(module).__name__}, {', '.join(sorted(str(s and s.algo) for s in schemes))}"
                + ("" if tensors else ", no tensors for each expert in the files"),
            )
        first = module.get_parameter(first_projection(module))
        sizes = (first.shape[0], first.shape[2], first.shape[1] // (2 if activation.gated else 1))
        apart = Experts(tensors, sizes, names=names, scheme=scheme, activation=activation, choice=choice, dtype=dtype)
        model.set_submodule(path, apart)


def first_projection(experts: nn.Module) -> str:
    """What transformers calls the first of the two fused tensors."""
    return "gate_up_proj" if "gate_up_proj" in experts._parameters else "up_proj"


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of transformers' own fused experts."""
    for path, module in model.named_modules():
        names = module._parameters.keys()
        if path.rpartition(".")[2] == "experts" and "down_proj" in names and {"gate_up_proj", "up_proj"} & names:
            yield path, module


def show_apart(experts: nn.Module, tensors: ExpertTensors) -> None:
    """Experts which are not quantized: the fused tensors stay what the model reads; the state dict shows each expert's own."""
    first = first_projection(experts)
    gated = first == "gate_up_proj"
    for fused in (first, "down_proj"):
        whole = experts._parameters.pop(fused)
        if whole is None:
            raise AssertionError(f"{fused} vanished")
        experts.register_parameter(f"{fused}_checkpoint", nn.Parameter(whole.detach(), requires_grad=False))
    registry = declare(experts, *(Alias(f"{fused}_checkpoint", fused) for fused in (first, "down_proj")))
    shards: dict[str, list[tuple[nn.Module, str, Tensor]]] = {}
    for (expert, shard, suffix), entry in tensors.entries.items():
        name = "down_proj_checkpoint" if shard == "w2" else f"{first}_checkpoint"
        view = experts.get_parameter(name)[expert]
        view = view if shard == "w2" or not gated else view.chunk(2)[SHARDS.index(shard)]
        shards.setdefault(name, []).append((_projection(experts, entry.name), suffix, view))
    for name, views in shards.items():
        registry.show_shards(name, views)


def _projection(experts: nn.Module, name: str) -> nn.Module:
    """The module ``experts.{expert}.{projection}`` which shows the tensor called ``name`` in the files; made if need be."""
    module = experts
    for part in name.split(".")[-3:-1]:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module


def _registry(module: nn.Module) -> AliasRegistry:
    registry = registry_of(module)
    if registry is None:
        raise AssertionError("create_weights did not declare the layer")
    return registry
