"""Filling a storage from outside: RDMA, CUDA IPC, or a collective straight into a buffer.

Such writes go past every operator, so the library must be told which bytes are going to change, and when they have. In checkpoint
order the writer gets a staging tensor, which lands by one scatter; in kernel order it gets the memory itself.
"""

from __future__ import annotations

from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ReloadError, foreign_code
from ..storage.coverage import Box
from ..tensors.faces import _Aliased
from ..tensors.geometry import place_of
from .registry import need_model

Order = Literal["checkpoint", "kernel"]


class Exposure:
    """Memory that somebody outside may write. Made by :func:`expose_for_writing`.

    Attributes:
        memory: plain contiguous tensor. In checkpoint order: staging of the name's (or the rows') shape and dtype, uninitialized.
            In kernel order: the kernel name's memory, or that of the experts asked for.
        order: "checkpoint" or "kernel".
        address: where ``memory`` begins.
    """

    def __init__(self, target: _Aliased, memory: Tensor, order: Order, writer: str) -> None:
        self._target, self._storage = target, target._alias_storage
        self.memory, self.order = memory, order
        self.address: int = memory.data_ptr()
        self._open = True
        if order == "kernel":
            self._storage.expose(self, writer)

    def written(self, rows: slice | None = None) -> None:
        """The writer is done: ``rows`` of the memory (default: all) are new, the others as before.

        Raises:
            ReloadError: it is closed already, or was closed from elsewhere (the model was invalidated meanwhile); or rows that
                this order does not keep together; then it stays open.
        """
        self._end(rows)

    def abandon(self) -> None:
        """The writer failed. Staging is dropped; raw memory that it may have written refuses until it is loaded again."""
        self._end(None, "whoever wrote the raw bytes failed")

    def _end(self, rows: slice | None, failed: str | None = None) -> None:
        if not self._open:
            raise ReloadError(
                "this exposure is closed already",
                label=self._storage.label,
                expected="one written() or abandon()",
                found="a second one",
                remedy="Expose the name again.",
            )
        target, box = _part(self._target, rows, self.order)
        self._open = False
        if self.order == "kernel":
            self._take_back(box, failed)
        elif failed is None:
            with torch.no_grad():
                target.copy_(self.memory if rows is None else self.memory[rows])

    def _take_back(self, box: Box, failed: str | None) -> None:
        """What is under ``box`` in the raw memory is LOADED or INVALID now."""
        storage = self._storage
        with storage.lock:
            storage.invalidate_if_due()
            if not storage.is_exposed_to(self):
                raise ReloadError(
                    "the exposure was ended from elsewhere: what it wrote does not count",
                    label=storage.label,
                    expected="memory exposed until written()",
                    found="invalidate(), or a failed reload, meanwhile",
                    remedy="Expose the name again.",
                )
            storage.changing()
            regions, _ = storage.states.begin(box)
            if storage.kernel_name is not None:
                storage.kernel_name.accept()
            storage.unexpose()  # now that it is INVALID
            if failed is None:
                storage.states.rollback((regions, dict.fromkeys(regions, storage.kernel_state)))
            else:
                storage.states.why = failed

    def __enter__(self) -> Exposure:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._open:
            self.written() if error is None else self.abandon()


def expose_for_writing(
    module: nn.Module, name: str, rows: slice | None = None, *, order: Order = "checkpoint", writer: str = "an outside writer"
) -> Exposure:
    """Lend memory for a checkpoint name (or for some of its rows), to be filled from outside.

    ``order="checkpoint"``: a staging tensor of the rows' size, which lands on ``written()``; the model serves on until then.
    ``order="kernel"``: the memory itself, in the order of the name's layout (``explain`` prints its line). Until ``written()`` or
    ``abandon()`` (leaving a ``with`` block calls one of them) it cannot be read, written or processed, and the module refuses.

    Args:
        module: the module that has the parameter.
        name: checkpoint name, dotted below ``module``.
        rows: what will be written; default all. In kernel order whole experts (indices of the first of several lead dims) alone.
        order: "checkpoint" or "kernel".
        writer: who writes, for messages.

    Raises:
        ReloadError: the name is not a declared checkpoint name, or rows that kernel order does not keep together.
        StateError: the raw memory is exposed already.
    """
    need_model(module)
    parameter = dict(module.named_parameters(remove_duplicate=False)).get(name) if isinstance(name, str) else None
    if not isinstance(parameter, _Aliased) or order not in ("checkpoint", "kernel"):
        raise ReloadError(
            "only declared checkpoint names can be exposed, in checkpoint or kernel order",
            module=type(module).__name__,
            name=name,
            expected="a declared Parameter, dotted below the module",
            found="no such Parameter" if parameter is None else type(parameter).__name__,
            remedy="Declare it first, or write an undeclared Parameter directly.",
        )
    target, box = _part(parameter, rows, order)
    geometry, storage = target._alias_geometry, parameter._alias_storage
    if order == "checkpoint":
        return Exposure(target, torch.empty(geometry.shape, dtype=geometry.dtype, device=geometry.device), order, writer)
    bound, kernel = storage.bound, storage.kernel_name
    memory = storage.elements[: bound.capacity] if kernel is None else kernel.memory
    lent = memory[slice(*box[0])] if bound.lead or not geometry.numel() else memory  # of no rows, no memory
    return Exposure(target, lent, order, writer)


def _part(target: _Aliased, rows: slice | None, order: Order) -> tuple[_Aliased, Box]:
    """``rows`` of ``target``, and in kernel order the box that they are. Raises ReloadError where they are no range of the memory
    that is lent in this order."""
    bound, refused = target._alias_storage.bound, "these rows are no range of the memory"
    facts = {
        "expected": "a slice of the rows; in kernel order the whole name, or a range of the experts of a stack",
        "found": f"{'a shard' if rows is None else rows} of {list(bound.shape)}",
        "remedy": 'Expose the whole, or order="checkpoint".',
    }
    box: Box = ()
    with foreign_code(refused, ReloadError, label=target._alias_storage.label, **facts):
        together = rows is None or (isinstance(rows, slice) and (rows.step or 1) > 0)
        part: _Aliased = target if rows is None or not together else target[rows]
        if together and order == "kernel":
            place, inner = place_of(target._alias_storage, part._alias_geometry), 1 if bound.lead else 0
            box = () if place is None else place.box
            together = place is not None and (box[inner:] == bound.whole[inner:] or not part.numel())
        if not together:
            raise ReloadError(refused, label=target._alias_storage.label, **facts)
    return part, box
