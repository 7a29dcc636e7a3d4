"""vLLM's RL API: start, update, finish. Its own engines and ours."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .engine import addresses, digest, model_of, reload, start, stop, tokens  # skips without vLLM

from safetensors.torch import load_file, save  # isort: skip
from vllm.config import WeightTransferConfig  # isort: skip
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # isort: skip
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine  # isort: skip
from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseNCCLWeightTransferEngine  # isort: skip
from vllm.model_executor.model_loader.checkpoint_weight_patch import (  # isort: skip
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)


class WithoutTransport(NCCLWeightTransferEngine):
    """vLLM's engine with its own start and finish; what NCCL would bring comes from a file."""

    def init_transfer_engine(self, init_info: Any) -> None:
        pass

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        return update_dict

    def receive_weights(self, update_info: dict[str, Any]) -> None:
        found = load_file(Path(update_info["folder"]) / "model.safetensors")
        names = list(found)[update_info["first"] :: 3]
        self.model.load_weights([(name, found[name]) for name in names])
        if update_info.get("breaks"):
            raise ConnectionError("the transport broke")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(update_info)


class SparseWithoutTransport(SparseNCCLWeightTransferEngine):
    """vLLM's sparse engine; what NCCL would bring is what differs between a file and another."""

    def init_transfer_engine(self, init_info: Any) -> None:
        pass

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        return update_dict

    def receive_weights(self, update_info: dict[str, Any]) -> None:
        old, new = (load_file(Path(update_info[key]) / "model.safetensors") for key in ("old", "new"))
        load_checkpoint_weight_patches(
            self.model, [patch(name, old[name], new[name]) for name in new if name.endswith(update_info["names"])]
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(update_info)


def patch(name: str, old: torch.Tensor, new: torch.Tensor) -> CheckpointWeightPatch:
    bits = torch.int16 if new.element_size() == 2 else torch.int32 if new.element_size() == 4 else torch.uint8
    indices = (old.reshape(-1).view(bits) != new.reshape(-1).view(bits)).nonzero().flatten()
    return CheckpointWeightPatch(name, tuple(new.shape), new.dtype, new.reshape(-1)[indices], indices)


@pytest.fixture(scope="module")
def of_b(moe: tuple[Path, Path]) -> tuple[list[str], list[int]]:
    llm = start(moe[1], skip_tokenizer_init=True)
    found = digest(llm), tokens(llm)
    stop(llm)
    return found


@pytest.fixture
def engine(request: pytest.FixtureRequest, moe: tuple[Path, Path]) -> Iterator[Any]:
    for name, kind in (("without_transport", WithoutTransport), ("sparse_without_transport", SparseWithoutTransport)):
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, kind)
    config = WeightTransferConfig(backend=request.param)
    llm = start(moe[0], skip_tokenizer_init=True, weight_transfer_config=config)
    yield llm
    stop(llm)


def update(llm: Any, **info: Any) -> None:
    llm.update_weights({"update_info": info})


@pytest.mark.parametrize("engine", ["without_transport"], indirect=True)
def test_written_through_the_model_refuses_between_chunks_and_requests_fail(
    engine: Any, moe: tuple[Path, Path], of_b: Any
) -> None:
    a, folder = tokens(engine), str(moe[1])
    engine.start_weight_update()
    assert tokens(engine) == a  # nothing was written yet
    for first in (0, 1, 2):
        update(engine, folder=folder, first=first)
        assert tokens(engine) == []
    engine.finish_weight_update()
    assert (digest(engine), tokens(engine)) == of_b and of_b[1] != a


@pytest.mark.parametrize("engine", ["without_transport"], indirect=True)
def test_an_update_in_chunks_is_a_reload_and_a_broken_one_is_given_up(
    engine: Any, moe: tuple[Path, Path], of_b: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIASPARAM_NVFP4_POLICY", "staged")
    a, before = (digest(engine), tokens(engine)), addresses(engine)
    folder = str(moe[1])

    engine.start_weight_update()
    update(engine, folder=folder, first=0)
    assert (digest(engine), tokens(engine)) == a  # the old weights serve
    with pytest.raises(ConnectionError):
        update(engine, folder=folder, first=1, breaks=True)
    assert (digest(engine), tokens(engine)) == a

    engine.start_weight_update()
    for first in (0, 1):
        update(engine, folder=folder, first=first)
    with pytest.raises(Exception, match="did not arrive whole"):
        engine.finish_weight_update("torn")
    assert (digest(engine), tokens(engine)) == a and engine.get_weight_version() != "torn"

    engine.start_weight_update()
    for first in (0, 1, 2):
        update(engine, folder=folder, first=first)
    engine.finish_weight_update("b")
    assert (digest(engine), tokens(engine)) == of_b and addresses(engine) == before and engine.get_weight_version() == "b"


@pytest.mark.parametrize("engine", ["without_transport"], indirect=True)
def test_what_fails_while_vllm_processes_its_own_layers_leaves_a_refusal(
    engine: Any, moe: tuple[Path, Path], of_b: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the policy gives declared layers their old weights back: some of vLLM's own have new ones then."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    monkeypatch.setenv("ALIASPARAM_NVFP4_POLICY", "staged-journal")

    def fails(self: Any, layer: Any) -> None:
        raise MemoryError("no memory to process it")

    with monkeypatch.context() as patch:
        patch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", fails)
        with pytest.raises(MemoryError):
            reload(engine, weights_path=str(moe[1]))
    assert tokens(engine) == []
    reload(engine, weights_path=str(moe[1]))
    assert (digest(engine), tokens(engine)) == of_b


@pytest.mark.parametrize("engine", ["aliasparam_nvfp4"], indirect=True)
def test_folders_buckets_and_deltas(engine: Any, moe: tuple[Path, Path], of_b: Any, tmp_path: Path) -> None:
    from aliasparam.reload.delta_writer import diff
    from aliasparam.reload.sources import SafetensorsFolder

    a = digest(engine), tokens(engine)
    delta = tmp_path / "weight_v000001"
    diff(SafetensorsFolder(moe[0]), SafetensorsFolder(moe[1]), delta, version=1, base_version=0)

    def change(*infos: dict[str, str]) -> None:
        engine.start_weight_update()
        for info in infos:
            update(engine, **info)
        engine.finish_weight_update()

    change({"delta": str(delta)})
    assert (digest(engine), tokens(engine)) == of_b
    with pytest.raises(Exception, match=r"checksum|another version"):  # it applies once
        change({"delta": str(delta)})
    assert (digest(engine), tokens(engine)) == of_b  # nothing was written

    found = load_file(moe[0] / "model.safetensors")
    halves = [{n: t for n, t in found.items() if ("layers.0" in n) is first} for first in (True, False)]
    change(*({"bucket": base64.b64encode(save(half)).decode()} for half in halves))
    assert (digest(engine), tokens(engine)) == a
    with pytest.raises(Exception, match="came in buckets"):
        change({"delta": str(delta)})
    change({"folder": str(moe[1])})
    assert (digest(engine), tokens(engine)) == of_b


@pytest.mark.parametrize("engine", ["aliasparam_nvfp4"], indirect=True)
def test_some_layers_by_scope(engine: Any, moe: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIASPARAM_NVFP4_SCOPE", "layers")
    monkeypatch.setenv("ALIASPARAM_NVFP4_POLICY", "staged")
    new, of_a = load_file(moe[1] / "model.safetensors"), digest(engine)
    experts = {n: t for n, t in new.items() if "layers.1.mlp.experts" in n}

    for torn in (True, False):
        engine.start_weight_update()
        sent = {n: t for n, t in experts.items() if not torn or "experts.5.down_proj.weight_scale" not in n}
        update(engine, bucket=base64.b64encode(save(sent)).decode())
        if torn:
            with pytest.raises(Exception, match="did not arrive whole"):
                engine.finish_weight_update()
            assert digest(engine) == of_a
        else:
            engine.finish_weight_update()
    layer = model_of(engine).get_submodule("model.layers.1.mlp.experts.routed_experts")
    assert torch.equal(layer.w2_weight[3], new["model.layers.1.mlp.experts.3.down_proj.weight"])
    assert digest(engine) != of_a


@pytest.mark.parametrize("engine", ["aliasparam_nvfp4"], indirect=True)
def test_tensors_of_a_rank_in_checkpoint_and_in_kernel_order(
    engine: Any, moe: tuple[Path, Path], of_b: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``is_checkpoint_format=False``: from a peer of the same layout, kernel bytes as they lie."""
    from aliasparam.module.registry import registries

    monkeypatch.setenv("ALIASPARAM_NVFP4_MOE_BACKEND", "flashinfer_trtllm")
    peer = start(moe[1], skip_tokenizer_init=True)
    sent = {name: p.detach().clone() for name, p in model_of(peer).named_parameters()}
    packed = {name: sent.pop(name) for name in list(sent) if not sent[name].numel()}  # on some CPUs, by vLLM
    for path, registry in registries(model_of(peer)):
        for name, source in registry.sources.items():
            if source.derived and "experts" in path:
                sent[f"{path}.{source.derived}"] = registry.module.get_buffer(source.derived).clone()
                del sent[f"{path}.{name}"]
    stop(peer)
    llm = start(moe[0], skip_tokenizer_init=True)
    before = addresses(llm)

    assert any(name.endswith("w13_blockscale_swizzled") for name in sent)
    reload(llm, weights_iterator=iter(sent.items()), is_checkpoint_format=False)
    assert digest(llm) == of_b[0] and addresses(llm) == before
    with pytest.raises(Exception, match=r"does not fit|no bytes of this kernel name"):
        reload(llm, weights_iterator=iter([(n, t.flatten()[:-2]) for n, t in sent.items()]), is_checkpoint_format=False)
    if packed:
        with pytest.raises(Exception, match="vLLM has packed"):
            reload(llm, weights_iterator=iter(packed.items()), is_checkpoint_format=False)
    assert digest(llm) == of_b[0]
    stop(llm)


@pytest.mark.parametrize("engine", ["sparse_without_transport"], indirect=True)
def test_sparse_patches_reach_floats_and_nothing_else(engine: Any, moe: tuple[Path, Path]) -> None:
    """vLLM marks unchanged elements by NaN: packed codes have none, and PyTorch places no e4m3 by index. Deltas have both."""
    folders = {"old": str(moe[0]), "new": str(moe[1])}
    a, new = (digest(engine), tokens(engine)), load_file(moe[1] / "model.safetensors")
    for names in ("_proj.weight", "_proj.weight_scale"):
        engine.start_weight_update()
        with pytest.raises((TypeError, NotImplementedError, RuntimeError)):
            update(engine, **folders, names=names)
        assert (digest(engine), tokens(engine)) == a

    engine.start_weight_update()
    update(engine, **folders, names=("weight_scale_2", "layernorm.weight"))
    engine.finish_weight_update()
    model, experts = model_of(engine), "model.layers.1.mlp.experts"
    layer = model.get_submodule(f"{experts}.routed_experts")
    found = layer.w2_weight_scale_2.detach().clone().reshape(-1)
    assert torch.equal(found, torch.stack([new[f"{experts}.{e}.down_proj.weight_scale_2"].reshape(()) for e in range(8)]))
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(model.get_parameter(norm), new[norm])
    assert len(tokens(engine)) == 6 and digest(engine) != a[0]  # processed: the factors that derive from scales too
