"""Weight updates by vLLM's RL API: every engine's go through our transaction, and one engine of our own.

``--weight-transfer-config '{"backend": "aliasparam_nvfp4"}'`` takes, in each ``update_weights``, one of:

| ``update_info`` | |
|---|---|
| ``{"folder": path}`` | a checkpoint folder |
| ``{"delta": path}`` | a delta folder on what serves, which is a local folder, or one and deltas |
| ``{"bucket": text}`` | the bytes of a safetensors file (names, shapes and dtypes in front), base64 |

Seams in vllm/distributed/weight_transfer/base.py and vllm/v1/worker/gpu_worker.py, tried on 0.32.0.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.model_loader import reload as vllm_reload

from aliasparam import process
from aliasparam.errors import ReloadError

from ..patched import PatchedFolder
from .reload import give_up, open_reload
from .ties import follow

NAME = "aliasparam_nvfp4"


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One of them."""

    folder: str | None = None
    delta: str | None = None
    bucket: str | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.folder, self.delta, self.bucket)) != 1:
            raise ValueError('update_info is one of {"folder": path}, {"delta": path}, {"bucket": base64}')


class FolderEngine(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """Updates from folders, deltas and buckets."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        #: The folder and the deltas on it that serve; None where it came in buckets.
        self.serving: tuple[str, ...] | None = (self.model_config.model,)
        self._next: tuple[str, ...] | None = self.serving

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self._next = None
        vllm_reload.initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """
        Raises:
            SourceError, DeltaError: no such folder, or a delta on something else than what serves. Nothing was written.
        """
        if update_info.bucket is not None:
            self.model.load_weights(iter(load(base64.b64decode(update_info.bucket, validate=True)).items()))
            return
        if self._next is not None:
            raise ReloadError("a folder is whole: nothing can come after it", found=update_info)
        parts = (update_info.folder,) if update_info.folder is not None else (*self._base(), str(update_info.delta))
        with PatchedFolder(parts[0], parts[1:]) as folder:
            folder.verify()
            self.model.load_weights(iter(folder))
        self._next = parts

    def _base(self) -> tuple[str, ...]:
        if self.serving is None or not Path(self.serving[0]).is_dir():
            raise ReloadError(
                "a delta needs the folder that it is based on",
                expected="an engine that serves a local folder, or deltas on one",
                found="weights that came in buckets" if self.serving is None else self.serving[0],
                remedy='Send {"folder": path} first.',
            )
        return self.serving

    def finish_weight_update(self) -> None:
        vllm_reload.finalize_layerwise_reload(self.model, self.model_config)
        self.serving = self._next

    def shutdown(self) -> None:
        pass


#: Engines by which all that comes passes ``model.load_weights``.
_LOADS_BY_MODEL = (FolderEngine, NCCLWeightTransferEngine, IPCWeightTransferEngine)


def reset(original: Any, engine: Any) -> None:
    """AROUND ``WeightTransferEngine.reset_weight_update_target``, which vLLM calls whenever an update ends or fails."""
    give_up(engine.model, "the update failed")
    original(engine)


def start(original: Any, worker: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND ``Worker._start_weight_update``."""
    engine = worker.weight_transfer_engine
    last = open_reload(engine.model) if worker._weight_update_active else None
    if last is not None and last.agreement.refused_elsewhere():
        worker._weight_update_active = False  # another rank has given it up
        engine.reset_weight_update_target()
    original(worker, *args, **kwargs)
    begun = open_reload(engine.model)
    if begun is not None and isinstance(engine, _LOADS_BY_MODEL):
        begun.serve_between()


def finish(original: Any, worker: Any) -> None:
    """AROUND ``Worker.finish_weight_update``, which otherwise stays in an update that failed."""
    active = worker._weight_update_active
    try:
        original(worker)
        model = worker.weight_transfer_engine.model
        process(model)  # what sparse patches wrote has had no reload
        follow(model)
    except BaseException:
        if active:
            worker._weight_update_active = False
            worker.weight_transfer_engine.reset_weight_update_target()
        raise


def register_engine() -> None:
    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, FolderEngine)
