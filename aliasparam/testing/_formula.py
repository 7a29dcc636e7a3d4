"""Kernel tensors by the line of a layout, digit by digit: shares no code with ``aliasparam.layout``, so that it can judge it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

#: A digit ("a" or "~a"), or a group of them.
Node = str | list["Node"]
#: Digit to its value for every coordinate of the tensor, and its capacity.
Digits = dict[str, tuple[Tensor, int]]


def kernel_tensor(text: str, tensor: Tensor) -> Tensor:
    """``tensor`` (checkpoint order, dims beside the line's in front) in the kernel order of ``text``, padding zero.

    Takes lines whose left side says the dims, joined by `` | ``, without ``bits=4``.
    """
    line, *following = text.split(" | ")
    left, right, sizes = _parsed(line)
    lead, core = tensor.shape[: tensor.dim() - len(left)], tensor.shape[tensor.dim() - len(left) :]
    digits, padded = _digits(left, core, sizes)
    flipped = {name for name in _leaves(left) if name.startswith("~")}
    position, capacity = torch.zeros(core, dtype=torch.int64), 1
    for leaf in _leaves(right):
        name = leaf.removeprefix("~")
        value, size = digits[name]
        backwards = leaf.startswith("~") != (f"~{name}" in flipped)
        position = position * size + (size - 1 - value if backwards else value)
        capacity *= size
    kernel = [math.prod(digits[n.removeprefix("~")][1] for n in _leaves([item])) for item in right]
    shape = kernel if any(isinstance(item, list) for item in right) else padded
    width = tensor.element_size()
    memory = torch.zeros((*lead, capacity, width), dtype=torch.uint8)
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).view(*lead, -1, width)
    memory[..., position.reshape(-1), :] = raw
    found = memory.reshape(-1).view(tensor.dtype).view(*lead, *shape)
    return kernel_tensor(" | ".join(following), found) if following else found


def _parsed(line: str) -> tuple[list[Node], list[Node], dict[str, int]]:
    sides, _, given = line.partition(",")
    left, right = (_nested(iter(re.findall(r"\w+|[~()]", side))) for side in sides.split("->"))
    return left, right, {name: int(size) for name, size in re.findall(r"(\w+)\s*=\s*(\d+)", given)}


def _nested(tokens: object) -> list[Node]:
    found: list[Node] = []
    for token in tokens:  # type: ignore[attr-defined]
        if token == ")":
            break
        if token == "~":
            found.append(f"~{next(tokens)}")  # type: ignore[call-overload]
        else:
            found.append(_nested(tokens) if token == "(" else token)
    return found


def _leaves(nodes: Sequence[Node]) -> list[str]:
    return [leaf for node in nodes for leaf in ([node] if isinstance(node, str) else _leaves(node))]


def _digits(left: list[Node], core: Sequence[int], sizes: dict[str, int]) -> tuple[Digits, list[int]]:
    """The digits of every element of a tensor of shape ``core``, and its padded shape."""
    digits: Digits = {}
    padded = []
    for dim, (group, extent) in enumerate(zip(left, core, strict=True)):
        along = torch.arange(extent).view([-1 if d == dim else 1 for d in range(len(core))]).expand(*core)
        padded.append(_split(group if isinstance(group, list) else [group], along, extent, sizes, digits))
    return digits, padded


def _split(group: list[Node], x: Tensor, extent: int, sizes: dict[str, int], digits: Digits) -> int:
    """Write coordinate ``x`` of ``extent`` values in the digits of ``group``; returns the product of their capacities."""
    fixed = [_size(item, sizes) for item in group]
    rest = math.prod(size for size in fixed if size is not None)
    room = 1
    for item, size in zip(reversed(group), reversed(fixed), strict=True):
        count = -(-extent // rest) if size is None else size
        value = x if item is group[0] else x % max(count, 1)
        x = x // max(count, 1)
        if isinstance(item, list):
            room *= _split(item, value, count, sizes, digits)
        else:
            digits[item.removeprefix("~")] = value, count
            room *= count
    return room


def _size(item: Node, sizes: dict[str, int]) -> int | None:
    if isinstance(item, str):
        return sizes.get(item.removeprefix("~"))
    inner = [_size(part, sizes) for part in item]
    return None if None in inner else math.prod(size for size in inner if size is not None)
