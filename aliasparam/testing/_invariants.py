"""What must hold after every step of the state machine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis.stateful import invariant
from torch import Tensor, nn

from .. import AliasRegistry, checkpoint_state_dict, registry_of
from ..errors import StaleKernelError, StateError
from ._oracle import expected_kernel_names, need_same


class Invariants:
    """The laws, over a module and its oracle."""

    device = "cpu"
    aliasing = True
    layer: nn.Module
    oracle: dict[str, Tensor]
    #: bool per element of every checkpoint tensor.
    arrived: dict[str, Tensor]
    addresses: dict[str, int]
    stale: bool
    retargeted = False

    def _registry(self) -> AliasRegistry:
        registry = registry_of(self.layer)
        if registry is None:
            raise AssertionError("the module declares nothing")
        return registry

    def _parameter(self, name: str) -> nn.Parameter:
        return self.layer.get_parameter(name)

    def _addresses(self) -> dict[str, int]:
        named = (*self.layer.named_parameters(), *self.layer.named_buffers())
        return {n: t.data_ptr() for n, t in named}

    def _is_whole(self) -> bool:
        return all(bool(arrived.all()) for arrived in self.arrived.values())

    @invariant()
    def law_1_every_name_reads_as_if_nothing_were_shared(self) -> None:
        for name, value in self.oracle.items():
            if bool(self.arrived[name].all()):
                need_same(self._parameter(name).clone(), value, name)
                continue
            try:
                self._parameter(name).clone()
            except StateError:
                continue
            raise AssertionError(f"{name} was read, and has not arrived whole (law 8)")

    @invariant()
    def law_3_no_address_moves(self) -> None:
        if self._addresses() != self.addresses:
            raise AssertionError(f"an address moved (law 3): {self.addresses} -> {self._addresses()}")

    @invariant()
    def law_4_memory_is_the_sum_of_capacities(self) -> None:
        registry = self._registry()
        for source in registry.sources.values():
            held = Tensor.untyped_storage(source.storage.buffer).nbytes() if source.storage is not None else 0
            if held != source.plan.nbytes:
                raise AssertionError(f"{source.name} holds {held} bytes, planned are {source.plan.nbytes} (law 4)")

    @invariant()
    def law_5_the_state_dict_is_what_was_written(self) -> None:
        if not self._is_whole():
            return
        exported = checkpoint_state_dict(self.layer)
        if exported.keys() != self.oracle.keys():
            raise AssertionError(f"the state dict lists {sorted(exported)} (law 5)")
        for name, value in self.oracle.items():
            need_same(exported[name], value, f"state dict {name}")
            if type(exported[name]) is not torch.Tensor:
                raise AssertionError(f"state dict {name} is a {type(exported[name])} (law 5)")

    @invariant()
    def law_8_a_stale_layer_refuses_and_a_ready_one_is_right(self) -> None:
        registry = self._registry()
        if registry.is_ready == self.stale:
            raise AssertionError(f"stale={self.stale}, but the registry says ready={registry.is_ready} (law 8)")
        if self.stale:
            self._refuses()
            return
        for name, value in expected_kernel_names(registry, self.oracle).items():
            need_same(self.layer.get_buffer(name), value, name)

    def _refuses(self) -> None:
        reads = [lambda n=name: self.layer.get_buffer(n).clone() for name in self._registry().kernel_names()]
        uses: list[Callable[[], object]] = [self.layer, *reads]
        for what in uses:
            try:
                what()
            except StaleKernelError:
                continue
            raise AssertionError("a stale layer answered (law 8)")
