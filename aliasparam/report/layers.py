"""Bytes of the layers of a model, added up from rows of a memory report."""

from __future__ import annotations

from dataclasses import asdict, dataclass

#: What a layer's memory is made of, in the order in which bars stack it, and what each part is.
PARTS = {
    "shared": "both formats in one memory",
    "own": "one format alone, and derived scalars",
    "padding": "what no checkpoint element fills",
    "copies": "kernel formats with memory of their own",
}


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer.

    Attributes:
        shared: seen by a checkpoint name and a kernel name.
        own: names without a kernel format, sources of copies, derivations.
        padding: allocated for the kernel format and filled by no checkpoint element.
        copies: kernel names that could not share, with memory of their own.
        saved: what a second copy of the shared ones would take.
    """

    layer: str
    shared: int = 0
    own: int = 0
    padding: int = 0
    copies: int = 0
    saved: int = 0

    @property
    def allocated(self) -> int:
        """All that is allocated: shared, own, padding, copies."""
        return self.shared + self.own + self.padding + self.copies

    def plus(self, other: LayerMemory) -> LayerMemory:
        """Both together, under this name."""
        return LayerMemory(self.layer, *(getattr(self, name) + getattr(other, name) for name in (*PARTS, "saved")))

    def as_dict(self) -> dict[str, str | int]:
        return {**asdict(self), "allocated": self.allocated}


def layer_of(module: str) -> str:
    """The layer that a module belongs to: its path up to the first number, ``model.layers.3``; without one, all of it."""
    parts = module.split(".")
    last = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: last + 1])


def size(count: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
