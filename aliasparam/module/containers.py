"""The dicts of a module in which declared names stand: put there, looked at, and saved as names instead of values."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..errors import AdoptionError, StateError
from ..spec import TensorSpec
from ..storage.guarded import Listener
from ..storage.kernel_name import KernelName
from ..tensors.parameter import AliasedParameter, SavedName

_TRACED = (FakeTensor, FunctionalTensor)  # torch.export traces with stand-ins, and puts everything back


#: A module's ``__dict__``, which of the dicts in it has a name, the name, what is there. By the way from the module on: other
#: code may put another dict in its place, or an attribute, which hides both.
Slot: TypeAlias = tuple[dict[str, Any], str, str, Any]


class Owner(Listener, Protocol):
    """Whose names they are: a registry."""

    label: str

    @property
    def moment(self) -> object: ...
    def kernel(self, name: str) -> KernelName | None: ...
    def look(self) -> None: ...


class Names(dict[str, Any]):
    """``module._parameters`` or ``module._buffers``, where ``owners`` (by name) have names among others."""

    __slots__ = ("owners",)

    def __init__(self, items: dict[str, Any], owners: dict[str, Owner], unchanged: None = None) -> None:
        super().__init__(items)
        self.owners = owners

    def __setitem__(self, name: str, value: Any) -> None:
        """``setattr``, as engines replace Parameters, and ``Module.to()`` buffers. Compiled callers do not run the guard, which
        compares names, so the owner looks at once, and what they find under a kernel name is of no use to them. The cast of a
        kernel name is refused before it goes on to other modules."""
        owner = None if isinstance(value, _TRACED) else self.owners.get(name)
        kernel = None if owner is None else owner.kernel(name)
        if kernel is not None and isinstance(value, Tensor) and not kernel.shows(value):
            if TensorSpec.of(value) != TensorSpec.of(kernel.memory):
                raise AdoptionError(
                    "a kernel-format name was given another dtype or shape",
                    label=kernel.label,
                    expected=TensorSpec.of(kernel.memory),
                    found=TensorSpec.of(value),
                    remedy="Module.half() and the like cannot apply to declared modules; cast the others.",
                )
            value = value if value.is_meta else kernel.other()
        super().__setitem__(name, value)
        if owner is not None:
            owner.look()

    def __reduce_ex__(self, protocol: Any) -> Any:
        unchanged = _Unchanged(self.owners)
        return Names, ({n: self._saved(n, v) for n, v in self.items()}, self.owners, unchanged)

    def _saved(self, name: str, value: Any) -> Any:
        if isinstance(value, AliasedParameter):
            return SavedName.of(value)
        owner = self.owners.get(name)
        kernel = None if owner is None else owner.kernel(name)
        return _SavedKernel(kernel, owner, value is not kernel.tensor) if kernel is not None and kernel.shows(value) else value


class _Unchanged:
    """What is copied or pickled after all names of a module, and refuses where one was written or derived meanwhile: a copy would
    have some names from before a load and some from after it."""

    def __init__(self, owners: dict[str, Owner]) -> None:
        self._began = [(owner, owner.moment) for owner in {id(owner): owner for owner in owners.values()}.values()]

    def __reduce__(self) -> Any:
        for owner, moment in self._began:
            if owner.moment != moment:
                raise StateError(
                    "this module was written or processed while it was copied",
                    module=owner.label,
                    expected="one generation of weights in all its names",
                    found="another version of a name at the end",
                    remedy="Copy it again, or while no other thread loads.",
                )
        return type(None), ()


class _SavedKernel:
    """What stands for a kernel name in the pickle of its module: its bytes are its storage's, which is saved once."""

    def __init__(self, *saved: Any) -> None:
        self._saved = saved

    def __reduce__(self) -> Any:
        return _face, self._saved


def _face(kernel: KernelName, owner: Owner, is_open: bool) -> Tensor:
    """What the copied registry shows; where the copy began at it, and it has no state yet, what was shown."""
    return kernel.refusing if getattr(owner, "is_open", is_open) else kernel.tensor


def standing(module: nn.Module, name: str) -> Any:
    """What is under a name: an attribute, which hides Parameters, which hide buffers. After ``del`` any may be put there."""
    if name in module.__dict__:
        return module.__dict__[name]
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


def all_stand(slots: Iterable[Slot]) -> bool:
    """Whether what was seen in each place is still there. For every forward."""
    for held, names, name, thing in slots:  # noqa: SIM110 - a generator costs as much as the rest
        if held[names].get(name) is not thing or name in held:
            return False
    return True


def ways_below(module: nn.Module, sought: Container[int], seen: set[int]) -> list[Slot]:
    """Where the modules whose ids are ``sought`` stand below ``module``, and all on the way to them; each in one place, the first
    that is not ``seen`` before: several may hold one, and a child its parent."""
    found: list[Slot] = []
    for name, child in module._modules.items():
        if child is None or id(child) in seen or name in module.__dict__:  # an attribute hides it
            continue
        seen.add(id(child))
        below = ways_below(child, sought, seen)
        if below or id(child) in sought:
            found += [(module.__dict__, "_modules", name, child), *below]
    return found


def put(module: nn.Module, name: str, tensor: Tensor, owner: Owner) -> None:
    """Show a checkpoint name, or a kernel name: as a non-persistent buffer."""
    is_parameter = isinstance(tensor, AliasedParameter)
    attribute, other = ("_parameters", "_buffers") if is_parameter else ("_buffers", "_parameters")
    module.__dict__.pop(name, None)
    module.__dict__[other].pop(name, None)
    (module._non_persistent_buffers_set.discard if is_parameter else module._non_persistent_buffers_set.add)(name)
    names = module.__dict__[attribute]
    if not isinstance(names, Names):
        names = module.__dict__[attribute] = Names(names, {})
    names.owners[name] = owner
    dict.__setitem__(names, name, tensor)
