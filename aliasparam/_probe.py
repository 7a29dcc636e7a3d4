"""The laws of a transform, tried on probes: at declaration, and by authors in their own tests.

[Note: probe size] A declaration probes at most ``PROBE_BYTES`` of a region, and two regions along each leading dim. A larger
region is cut twice: all its columns over few rows, and all its rows over few columns. Bands tell where a cut is fair; without
bands, dims are halved as long as the transform takes the smaller shape. Where no cut is taken, or a cut fails, one whole region
is probed: nothing right is refused because of a cut.

[Note: probe values] What a permutation does wrong shows exactly: the probes hold each byte's position, a digit at a time. What
arithmetic does wrong shows by value: all 256 bytes at every place of an element occur, and the words which arithmetic is known
to change (-0, infinities, both kinds of NaN, subnormals).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ._transform import Band, TensorSpec, Transform, as_bytes
from .errors import AliasError, TransformError

#: Bytes of a region that a declaration probes at most, where the transform can be tried on a part of one.
PROBE_BYTES = 1 << 18

#: Probes have values also inside ``with torch.device("meta")``.
_CPU = torch.device("cpu")
_MEND = "Declare the step as lossy (lossless = False) so that its source is kept, or mend the inverse."
_RAISE_DIMS = "Raise core_dims, so that the dimensions it mixes count as one region."
_PURE = "Work on a clone: forward and inverse are pure, the library calls them on memory that others read."
#: Bit patterns, by element width, which floating-point arithmetic may change, and the extremes of integers.
_WORDS = {
    2: (0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0x0001, 0x7FFF, 0xFFFF),
    4: (0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x00000001, 0x7FFFFFFF, 0xFFFFFFFF),
    8: (1 << 63, 0x7FF << 52, 0xFFF << 52, 0x7FF8 << 48, (0x7FF << 52) | 1, 1, (1 << 63) - 1, (1 << 64) - 1),
}


def check_declared(transform: Transform, spec: TensorSpec) -> None:
    """:func:`check_inverse` on probes of bounded size. See [Note: probe size]."""
    lead = max(len(spec.shape) - transform.core_dims, 0)
    few = tuple(min(max(n, 1), 2) for n in spec.shape[:lead])  # no experts here still means a transform of experts
    core = TensorSpec(spec.shape[lead:], spec.dtype)
    cuts = list(_cuts(transform, core)) if core.nbytes > PROBE_BYTES else []
    try:
        for shape in cuts:
            check_inverse(transform, TensorSpec((*few, *shape), spec.dtype))
    except Exception:
        cuts = []
    if not cuts:
        check_inverse(transform, TensorSpec((*few, *core.shape), spec.dtype))


def check_inverse(transform: Transform, spec: TensorSpec, *, device: torch.device | str = "cpu") -> None:
    """Raise TransformError unless ``transform`` keeps its laws on probes of ``spec``.

    Checked: the promised spec, ``inverse(forward(x)) == x`` byte for byte, that neither writes its argument, and that regions
    and bands convert by themselves. See [Note: probe values] for the values. Probes are of the full ``spec``: give a small one.
    """
    for values in _patterns(spec):
        _check_round_trip(transform, values.view(spec.dtype).reshape(spec.shape).to(device))
    probe = _random(spec).view(spec.dtype).reshape(spec.shape).to(device)
    after = transform.forward(probe.clone()).contiguous()
    _check_regions(transform, probe, after)
    _check_band(transform, probe, after)


# -- laws ------------------------------------------------------------------------------------------------------------------


def _check_round_trip(transform: Transform, probe: Tensor) -> None:
    spec, promised = TensorSpec.of(probe), transform.output_spec(TensorSpec.of(probe))
    given = probe.clone()
    after = transform.forward(given)
    if TensorSpec.of(after) != promised:
        raise TransformError(
            f"{transform} gives another spec than it promises",
            expected=promised,
            found=TensorSpec.of(after),
            remedy="Mend output_spec(), or the shape and dtype that forward() returns.",
        )
    _need_untouched(transform, "forward", given, probe)
    after = after.clone(memory_format=torch.contiguous_format)
    given = after.clone()
    back = transform.inverse(given, spec)
    if TensorSpec.of(back) != spec:
        raise TransformError(
            f"the inverse of {transform} gives another spec", expected=spec, found=TensorSpec.of(back), remedy=_MEND
        )
    wrong = as_bytes(back) != as_bytes(probe)
    if bool(wrong.any()):
        first = int(wrong.int().argmax())
        raise TransformError(
            f"the inverse of {transform} does not invert",
            expected="inverse(forward(x)) == x for every byte",
            found=f"{int(wrong.sum())} of {spec.nbytes} bytes differ, first at byte {first}: "
            f"{int(as_bytes(back)[first])} instead of {int(as_bytes(probe)[first])} ({spec})",
            remedy=_MEND,
        )
    _need_untouched(transform, "inverse", given, after)


def _need_untouched(transform: Transform, which: str, given: Tensor, was: Tensor) -> None:
    if not torch.equal(as_bytes(given), as_bytes(was)):
        raise TransformError(
            f"{which} of {transform} writes its argument",
            expected="an argument that is as it was",
            found="other bytes in it",
            remedy=_PURE,
        )


def _check_regions(transform: Transform, probe: Tensor, after: Tensor) -> None:
    lead = max(probe.dim() - transform.core_dims, 0)
    if not lead or probe.numel() == 0:
        return
    spec = TensorSpec(tuple(probe.shape[lead:]), probe.dtype)
    for index in itertools.product(*(range(n) for n in probe.shape[:lead])):
        alone = transform.forward(probe[index].clone())
        same = torch.equal(as_bytes(alone), as_bytes(after[index]))
        if not same or not torch.equal(as_bytes(transform.inverse(alone.clone(), spec)), as_bytes(probe[index])):
            _refuse_mixing(transform, f"another result for x{list(index)} alone than within {TensorSpec.of(probe)}")
    stack = transform.forward(probe.reshape(-1, *spec.shape).clone())  # as a storage converts runs of regions
    if not torch.equal(as_bytes(stack), as_bytes(after)):
        _refuse_mixing(transform, f"another result for {TensorSpec.of(probe)} than for its regions in one stack")


def _refuse_mixing(transform: Transform, found: str) -> None:
    raise TransformError(
        f"{transform} mixes its regions",
        expected="forward(x)[e] == forward(x[e]) for every leading index e, and the inverse likewise",
        found=found,
        remedy=_RAISE_DIMS,
    )


def _check_band(transform: Transform, probe: Tensor, after: Tensor) -> None:
    lead = max(probe.dim() - transform.core_dims, 0)
    one = probe.reshape(-1, *probe.shape[lead:])[:1].reshape(probe.shape[lead:])
    band = transform.band(TensorSpec.of(probe))
    if band is None or one.dim() != 2 or one.numel() == 0 or one.shape[band.dim] <= band.size:
        return
    whole = after.reshape(-1, *after.shape[lead:])[0]
    pieces = torch.split(one, band.size, band.dim)
    for k in sorted({0, 1, len(pieces) // 2, len(pieces) - 1}):
        alone = transform.forward(pieces[k].clone())
        if band.dim == -2:
            part = whole.numel() * whole.element_size() // len(pieces)
            same = torch.equal(as_bytes(alone), as_bytes(whole)[k * part : (k + 1) * part])
        else:
            same = torch.equal(as_bytes(alone), as_bytes(whole[..., k * band.size : (k + 1) * band.size]))
        if not same:
            raise TransformError(
                f"the {band} of {transform} does not convert by itself",
                expected="the bytes which the band has within the whole",
                found=f"others for band {k} of {len(pieces)} in {TensorSpec.of(probe)}",
                remedy="Return None from band(), or a larger size.",
            )


# -- which part of a region ------------------------------------------------------------------------------------------------


def _cuts(transform: Transform, core: TensorSpec) -> Iterator[tuple[int, ...]]:
    """Core shapes within the bound: few rows of all columns, and few columns of all rows, as far as the transform takes them."""
    band = transform.band(core) if len(core.shape) >= 2 else None
    for dim in (-2, -1)[-len(core.shape) :] if core.shape else ():
        shape = _banded(core, band) if band is not None and band.dim == dim else _halved(transform, core, dim)
        if shape is not None:
            yield shape


def _banded(core: TensorSpec, band: Band) -> tuple[int, ...] | None:
    """Whole bands within the bound, two at least, and the part of one which the extent ends with."""
    extent = core.shape[band.dim]
    count = max(2, PROBE_BYTES * extent // (core.nbytes * band.size))
    return _with(core, band.dim, min(extent, count * band.size + extent % band.size))


def _halved(transform: Transform, core: TensorSpec, dim: int) -> tuple[int, ...] | None:
    shape = core.shape
    while TensorSpec(shape, core.dtype).nbytes > PROBE_BYTES:
        smaller = _with(TensorSpec(shape, core.dtype), dim, -(-shape[dim] // 2))
        if smaller == shape or not _takes(transform, TensorSpec(smaller, core.dtype)):
            return None
        shape = smaller
    return shape


def _with(core: TensorSpec, dim: int, extent: int) -> tuple[int, ...]:
    shape = list(core.shape)
    shape[dim] = extent
    return tuple(shape)


def _takes(transform: Transform, spec: TensorSpec) -> bool:
    try:
        transform.output_spec(spec)
    except (AliasError, ValueError, RuntimeError, ArithmeticError, LookupError):
        return False
    return True


# -- values ----------------------------------------------------------------------------------------------------------------


def _patterns(spec: TensorSpec) -> Iterator[Tensor]:
    """u8 ``[nbytes]`` each. See [Note: probe values]."""
    count, width = spec.nbytes, spec.dtype.itemsize
    if spec.dtype is torch.bool:
        yield from (_digit(count, 2, place) for place in range(max(1, (count - 1).bit_length())))
        yield 1 - _digit(count, 2, 0)
        return
    places = 1
    while 256**places < count:
        places += 1
    yield from (_digit(count, 256, place) for place in range(places))
    yield 255 - _digit(count, 256, 0)
    starts = range(0, 256, count) if 0 < count < 256 else (0,)
    shifts = {start + place for start in starts for place in range(width)} - {0}
    yield from (_digit(count, 256, 0) + shift for shift in sorted(shifts))
    if width in _WORDS and count:
        words = torch.tensor([list(word.to_bytes(width, "little")) for word in _WORDS[width]], dtype=torch.uint8, device=_CPU)
        for first in range(0, len(words), spec.numel):
            yield words.roll(-first, 0).repeat(-(-spec.numel // len(words)), 1)[: spec.numel].reshape(-1)


def _digit(count: int, base: int, place: int) -> Tensor:
    """The ``place``-th digit of each byte's position, u8 ``[count]``: no wider integers, probes may be large."""
    step = base**place
    values = torch.arange(min(base, -(-count // step)), device=_CPU).to(torch.uint8)
    return values.repeat(-(-count // (step * base))).repeat_interleave(step)[:count].clone()


def _random(spec: TensorSpec) -> Tensor:
    """Bytes that tell regions and bands apart, always the same ones."""
    high = 2 if spec.dtype is torch.bool else 256
    return torch.randint(0, high, (spec.nbytes,), dtype=torch.uint8, device=_CPU, generator=torch.Generator().manual_seed(131))
