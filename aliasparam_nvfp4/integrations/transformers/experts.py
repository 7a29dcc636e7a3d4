"""The modules which stand in for a transformers model's fused experts.

transformers 5 holds the experts of a layer as two fused tensors and loads them by conversions that know nothing of scales. So
NVFP4 experts are kept from its loader: a module without tensors stands in while the model loads, then reads its own ranges from
the folder straight into the storage of :class:`~aliasparam_nvfp4.NvFp4MoEMethod`. The state dict has the checkpoint's names, one
tensor for each expert and projection, each a view of the fused storage (see [Note: fused but shown apart] in modules.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aliasparam import Alias, AliasRegistry, declare, registry_of

from ...checkpoint import CheckpointFolder, ExpertTensors, QuantConfig, UnsupportedFormatError
from ...checkpoint.experts import ExpertKey
from ...checkpoint_format import CheckpointFormat
from ...moe import ExpertRanks, NvFp4MoEMethod
from ...moe.folder import SHARDS, ExpertSource, expert_source, expert_specs, load_from

#: What all experts of a layer may be quantized to.
_SERVED = ({"NVFP4"}, {"W4A16_NVFP4"})


class Experts(nn.Module):
    """NVFP4 experts of one layer: ``forward(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H]``.

    Args:
        tensors: the layer's experts in the folder that is being loaded.
        sizes: (experts, H, I) of the whole layer.
        names: of the tensors.
        input_scale: whether activations have scales.
        runner: an MoE runner's name, or "auto".
        ranks: the part of this process. With more than one, results are added up over the default process group.
        dtype: of activations.
    """

    def __init__(
        self,
        tensors: ExpertTensors,
        sizes: tuple[int, int, int],
        *,
        names: CheckpointFormat,
        input_scale: bool,
        runner: str,
        ranks: ExpertRanks,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.quant_method = NvFp4MoEMethod(runner, checkpoint=names, input_scale=input_scale, **asdict(ranks))
        #: What the files call this layer's experts.
        self.layer = tensors.layer
        #: The names of its tensors in the state dict: those of the files it was loaded from.
        self.names = {key: entry.name for key, entry in tensors.entries.items()}
        self.ranks = ranks
        self._sizes, self._dtype = sizes, dtype

    def check_headers(self, tensors: ExpertTensors) -> None:
        """Raise CheckpointError where the files' experts are not those of the model."""
        experts, hidden, intermediate = self._sizes
        method = self.quant_method
        tensors.need(experts, expert_specs(method.checkpoint, hidden, intermediate, input_scale=method.input_scale))

    def load(self, folder: CheckpointFolder, tensors: ExpertTensors, device: torch.device) -> None:
        """Allocate on ``device``, read this rank's part, process, and show every expert's tensors.

        Raises:
            CheckpointError: see :meth:`~aliasparam_nvfp4.moe.folder.ExpertSource.check`.
            ScaleError: likewise.
        """
        experts, hidden, intermediate = self._sizes
        own, width = self.ranks.divided(experts, intermediate)
        with torch.device(device):
            self.quant_method.create_weights(self, own, hidden, width, self._dtype)
        source = self.source(folder, tensors)
        source.check()
        load_from(source, self)
        self._show(source)

    def source(self, folder: CheckpointFolder, tensors: ExpertTensors) -> ExpertSource:
        """Where this layer's part lies in a folder."""
        return expert_source(self.quant_method, self, folder, tensors)

    def _show(self, source: ExpertSource) -> None:
        registry = _registry(self)
        shards: dict[str, list[tuple[nn.Module, str, Tensor]]] = {}
        for part in source.parts():
            name = f"{'w2' if part.key[1] == 'w2' else 'w13'}_{part.key[2]}"
            view = self._view(self.get_parameter(name), part.key, source)
            shards.setdefault(name, []).append((_projection(self, part.name), part.key[2], view))
        for name, views in shards.items():
            registry.show_shards(name, views)

    def _view(self, param: Tensor, key: ExpertKey, source: ExpertSource) -> Tensor:
        """One expert's tensor in a fused one, in the shape that the checkpoint has."""
        expert, shard, suffix = key
        row = expert if suffix == source.format.input_global else expert - source.shape.first_expert
        if suffix in (source.format.weight_global, source.format.input_global):
            flat = param[row : row + 1] if shard == "w2" else param[row, 1:] if shard == "w3" else param[row, :1]
            return flat.view(source.format.scalar_shape)
        return param[row] if shard == "w2" else param[row].chunk(2)[SHARDS.index(shard)]

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
    config: QuantConfig,
    layers: Mapping[str, ExpertTensors],
    runner: str,
    ranks: ExpertRanks,
    dtype: torch.dtype,
) -> None:
    """Put :class:`Experts` in the place of the model's quantized experts, before it is loaded.

    Args:
        model: on the meta device.
        config: says which modules are quantized.
        layers: experts in the files, by the path of their module in ``model``.
        runner: see :class:`Experts`.
        ranks: see :class:`Experts`.
        dtype: see :class:`Experts`.

    Raises:
        UnsupportedFormatError: experts of another shape or activation, or quantized in part or otherwise.
    """
    for path, module in list(fused_experts(model)):
        tensors = layers.get(path)
        algos = {config.algo_of(name) for name in tensors.projections()} if tensors else {config.algo_of(path)}
        if algos == {None}:
            continue
        if tensors is None or algos not in _SERVED or not _is_swiglu(module):
            raise UnsupportedFormatError(
                "experts of this kind are not supported",
                module=path,
                expected="all experts NVFP4 or W4A16_NVFP4, each with tensors of its own, gated by SiLU, without biases",
                found=f"{type(module).__name__}, {', '.join(sorted(map(str, algos)))}"
                + ("" if tensors else ", no tensors for each expert in the files"),
            )
        gate_up = module.get_parameter("gate_up_proj")
        sizes = (gate_up.shape[0], gate_up.shape[2], gate_up.shape[1] // 2)
        made = Experts(
            tensors, sizes, names=config.tensors, input_scale=algos == {"NVFP4"}, runner=runner, ranks=ranks, dtype=dtype
        )
        model.set_submodule(path, made)


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of transformers' own fused experts."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == "experts" and {"gate_up_proj", "down_proj"} <= module._parameters.keys():
            yield path, module


def _is_swiglu(module: nn.Module) -> bool:
    plain = getattr(module, "is_concatenated", True) and not any(
        getattr(module, odd, False) for odd in ("has_bias", "is_transposed", "has_post_expert_norm")
    )
    return plain and type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def show_apart(experts: nn.Module, tensors: ExpertTensors) -> None:
    """Experts which are not quantized: the fused tensors stay what the model reads; the state dict shows each expert's own."""
    for fused in ("gate_up_proj", "down_proj"):
        whole = experts._parameters.pop(fused)
        if whole is None:
            raise AssertionError(f"{fused} vanished")
        experts.register_parameter(f"{fused}_checkpoint", nn.Parameter(whole.detach(), requires_grad=False))
    registry = declare(experts, *(Alias(f"{fused}_checkpoint", fused) for fused in ("gate_up_proj", "down_proj")))
    shards: dict[str, list[tuple[nn.Module, str, Tensor]]] = {}
    for (expert, shard, suffix), entry in tensors.entries.items():
        name = "down_proj_checkpoint" if shard == "w2" else "gate_up_proj_checkpoint"
        view = experts.get_parameter(name)[expert]
        view = view if shard == "w2" else view.chunk(2)[SHARDS.index(shard)]
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
