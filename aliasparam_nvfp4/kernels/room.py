"""Whether a loaded layer can be moved to another kernel's format, asked before the first layer of a model is moved."""

from __future__ import annotations

from collections.abc import Mapping

from aliasparam import AliasRegistry, Layout
from aliasparam.errors import PointerError

from .base import Kernel


def need_room(kernel: Kernel, registry: AliasRegistry, formats: Mapping[str, Layout], where: str, planned_by: str) -> None:
    """Nothing is changed.

    Args:
        kernel: to which a layer shall be moved.
        registry: of the layer.
        formats: checkpoint name to the order that it must be brought to.
        where: the layer, for messages.
        planned_by: what takes ``retarget_to``.

    Raises:
        PointerError: a format needs more padding than the layer has memory for.
    """
    try:
        registry.check_retarget(formats)
    except PointerError as error:
        raise PointerError(
            f"this {kernel.what}'s format needs more padding than the layer has room for",
            module=where,
            name=error.name,
            expected=error.expected,
            found=f"{error.found} for {kernel.name}",
            remedy=f'Plan room when the layer is made: retarget_to=("{kernel.name}",) of {planned_by}.',
        ) from None
