"""Weight updates of SGLang as transactions of this library: whole or refused, with the old weights serving on.

Hooks on ``WeightUpdater`` (``sglang/srt/model_executor/model_runner_components/weight_updater.py``) and
``SchedulerWeightUpdaterManager`` (``sglang/srt/managers/scheduler_components/weight_updater.py``), tried on 0.5.23. A model's own
``load_weights`` runs as it is; what it writes goes through a session (aliasparam/reload/loading.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import torch
from torch import Tensor, nn

from aliasparam import reload
from aliasparam.errors import AliasError, ReloadError
from aliasparam.reload import ReloadSession
from aliasparam.reload.session import Phase

from ..folder import open_checked, stream
from ..hooking import Hook
from ..options import said
from ..patched import PatchedFolder
from . import delta
from .loaders import checked_loading, loaded_before, need_all
from .models import finish, is_ours
from .ranks import attempt, attempt_on_all, world
from .served import served

#: The update session of each model, between ``begin_weight_update`` and ``end_weight_update``; or why it was aborted.
_sessions: weakref.WeakKeyDictionary[nn.Module, ReloadSession | str] = weakref.WeakKeyDictionary()


def from_disk(
    original: Any,
    updater: Any,
    model_path: str,
    load_format: str,
    weight_name_filter: Callable[[str], bool] | None = None,
    recapture_cuda_graph: bool = False,
) -> tuple[bool, str]:
    """AROUND ``WeightUpdater.update_weights_from_disk``: checked on all ranks, then written, then committed on all or none."""
    model = updater.get_model()
    if not is_ours(model):
        return original(updater, model_path, load_format, weight_name_filter, recapture_cuda_graph)  # type: ignore[no-any-return]
    if (reason := _forbidden(updater, "update_weights_from_disk")) is not None:
        return False, reason
    if delta.is_delta(model_path):
        return _from_delta(original, updater, model_path, load_format)
    before, known = updater.model_config.model_path, served(model)
    opened: list[Any] = []

    def check() -> None:
        said("policy", "journal")
        opened.append(open_checked(model_path, before, known.tensors, world()))

    problem = attempt_on_all(check)
    if problem is not None:
        for folder in opened:
            folder.close()
        return False, f"The update was refused, and the old weights serve: {problem}"
    (folder,) = opened
    wanted = [n for n in known.tensors if n in folder.tensors and (weight_name_filter is None or weight_name_filter(n))]
    kept = (pair for pair in stream(folder, known.tensors) if weight_name_filter is None or weight_name_filter(pair[0]))
    with closing(folder):
        problem = _replaced(updater, model, kept, wanted, whole=weight_name_filter is None)
    if problem is not None:
        return False, f"Failed to update weights: {problem}"
    known.base = known.version = 0
    _tell_engine(updater, model, model_path, load_format, recapture_cuda_graph)
    return True, "Succeeded to update model weights."


def _replaced(
    updater: Any, model: Any, weights: Iterator[tuple[str, Tensor]], wanted: list[str], *, whole: bool = True
) -> str | None:
    """One transaction; what went wrong, or None. ``whole``: every tensor of our layers must come."""
    session = reload(model, scope="partial", policy=said("policy", "journal"), source="disk")

    def fill() -> None:
        session.begin()
        with checked_loading(model, session, whole=True) as (seen, written):
            _load_weights(updater, model, weights)
        need_all(wanted, seen)
        if whole:
            need_all(loaded_before(session), written)

    return committed(model, session, fill)


def _from_delta(original: Any, updater: Any, model_path: str, load_format: str) -> tuple[bool, str]:
    """A chain of deltas; a full version on the way is loaded first, and served if a delta on it is refused."""
    model = updater.get_model()
    known = served(model)
    full: list[str | None] = []
    problem = attempt_on_all(lambda: full.append(delta.full_version(model_path, known.version)))
    if problem is not None:
        return False, f"The delta was refused, and the old weights serve: {problem}"
    if full[0] is not None:
        success, message = from_disk(original, updater, full[0], load_format)
        if not success:
            return False, message
        known.base = known.version = delta.version_of(full[0])
    with ExitStack() as stack:
        apply = _apply_delta if world().ranks == 1 else _load_patched
        problem = apply(updater, model, model_path, stack)
    if problem is not None:
        return False, f"The delta was refused, and version {known.version} serves: {problem}"
    known.version = delta.version_of(model_path)
    return True, f"Succeeded to apply deltas up to version {known.version}."


def _apply_delta(updater: Any, model: Any, path: str, stack: ExitStack) -> str | None:
    """Inside kernel bytes."""
    sessions: list[ReloadSession] = []
    problem = attempt(lambda: sessions.append(delta.prepare(model, path, stack)))
    return committed(model, sessions[0], lambda: None) if problem is None else problem


def _load_patched(updater: Any, model: Any, path: str, stack: ExitStack) -> str | None:
    """Through the loaders, whose ranks divide tensors."""
    found: list[PatchedFolder] = []
    base, known = updater.model_config.model_path, served(model).tensors
    problem = attempt_on_all(lambda: found.append(delta.patched(model, path, base, stack)))
    if problem is not None:
        return problem
    return _replaced(updater, model, (pair for pair in found[0] if pair[0] in known or not known), list(known))


def begin(original: Any, updater: Any) -> None:
    """AROUND ``WeightUpdater.begin_weight_update``: opens a session. Nothing is restored, because nothing was converted."""
    model = updater.get_model()
    if not is_ours(model):
        original(updater)
        return
    session = reload(model, scope="partial", policy=said("session_policy", "staged-journal"), source="session")
    session.begin()
    _sessions[model] = session


def receive(original: Any, updater: Any, *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """AROUND ``update_weights_from_tensor`` and ``load_weights_from_distributed``: what arrives waits in the session."""
    model = updater.get_model()
    session = _sessions.get(model)
    if session is None:
        return original(updater, *args, **kwargs)  # type: ignore[no-any-return]
    if isinstance(session, str):
        return False, session
    result: list[tuple[bool, str]] = []

    def load() -> None:
        with checked_loading(model, session, whole=False):
            result.append(original(updater, *args, **kwargs))
        if not result[0][0]:
            raise ReloadError(result[0][1])

    problem = attempt(load)
    if problem is None:
        return result[0]
    problem = f"The session was aborted, and the old weights serve: {problem}{_aborted(model, session)}"
    _sessions[model] = problem
    return False, problem


def end(original: Any, updater: Any, *, run_post_load: bool) -> None:
    """AROUND ``WeightUpdater.end_weight_update``: commits on all ranks, or aborts on all.

    Raises:
        ReloadError: some tensor did not arrive whole, or cannot be served; the old weights serve. :func:`answered` says it.
    """
    model = updater.get_model()
    session = _sessions.pop(model, None)
    if session is None:
        original(updater, run_post_load=run_post_load)
        return

    def fill() -> None:
        if isinstance(session, str):
            raise ReloadError(session)

    problem = committed(model, session, fill)
    if problem is not None:
        raise ReloadError(problem)


def answered(output: str) -> Hook:
    """AROUND ``begin_weight_update`` and ``end_weight_update`` of ``SchedulerWeightUpdaterManager``, answering with ``output``;
    so an error is an answer, and no end of the scheduler. All ranks come here or none."""

    def hook(original: Any, manager: Any, request: Any) -> Any:
        from sglang.srt.managers import io_struct

        try:
            return original(manager, request)
        except AliasError as error:
            manager._session = None
            return getattr(io_struct, output)(success=False, message=str(error))

    return hook


# -- the transaction ---------------------------------------------------------------------------------------------------


def committed(model: nn.Module, session: ReloadSession | str, fill: Callable[[], None]) -> str | None:
    """Fill, prepare, put in place and commit; after each step all ranks go on or all abort. Returns what went wrong, or None."""

    def prepare() -> None:
        fill()
        assert not isinstance(session, str)
        if session.phase is Phase.OPEN:
            session.prepare()

    problem = attempt_on_all(prepare)
    if problem is None:
        assert not isinstance(session, str)
        problem = attempt_on_all(session.switch)
    if problem is not None:
        return problem + (_aborted(model, session) if not isinstance(session, str) else "")
    assert not isinstance(session, str)
    session.commit()
    finish(model)
    return None


def _aborted(model: nn.Module, session: ReloadSession) -> str:
    """End the session; a note where the old weights could not be brought back."""
    problem = attempt(session.abort)
    if problem is not None:
        return f"\nThe old weights could not be brought back, and the model refuses: {problem}"
    if session.observed.bytes:
        problem = attempt(lambda: finish(model))  # what the model derives by itself, from the old weights again
    return "" if problem is None else f"\n{problem}"


# -- the engine's parts ------------------------------------------------------------------------------------------------


def _load_weights(updater: Any, model: nn.Module, weights: Iterator[Any]) -> None:
    from sglang.srt.model_loader.loader import DefaultModelLoader
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    with set_default_torch_dtype(updater.model_config.dtype):
        DefaultModelLoader.load_weights_only(model, weights, torch.device(updater.device))


def _forbidden(updater: Any, what: str) -> str | None:
    """SGLang's own reasons to take no update."""
    from sglang.srt.model_executor.model_runner_components import weight_updater

    updater._assert_weight_cache_inactive(what)
    reason: str | None = weight_updater._unsupported_derived_weight_cache_error(updater.get_model())
    return reason


def _tell_engine(updater: Any, model: nn.Module, model_path: str, load_format: str, recapture: bool) -> None:
    """As ``update_weights_from_disk`` ends. Addresses did not move, so graphs are captured again only if asked for."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.weight_utils import get_pp_stage_load_group

    updater.model_config.model_path = model_path
    config = LoadConfig(load_format=load_format, load_group=get_pp_stage_load_group())
    updater.update_model_fields(model, model_path=model_path, load_format=load_format, load_config=config)
    if recapture and updater.device == "cuda":
        updater.recapture_cuda_graph()
