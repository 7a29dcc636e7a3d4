"""SGLang's model runner in this process, as ``sglang.benchmark.one_batch`` starts it: its loaders, its forward, its updater."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: How an engine runs on a CPU.
CPU: dict[str, Any] = {
    "device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch", "disable_radix_cache": True,
    "disable_overlap_schedule": True, "max_total_tokens": 1024, "mem_fraction_static": 0.3, "log_level": "error",
    "skip_tokenizer_init": True,
}  # fmt: skip
PROMPT = list(range(5, 25))


_published: list[Any] = []  # what a process serves with is said once; later models take it too


def started(folder: Path) -> tuple[Any, Any]:
    """(arguments for the model, ports); the first of a process starts its distributed parts."""
    from sglang.benchmark import one_batch
    from sglang.srt.server_args import PortArgs, ServerArgs

    arguments = ServerArgs(model_path=str(folder), **CPU)
    arguments.resolve_once()
    ports = PortArgs.init_new(arguments)
    if not _published:
        one_batch._set_envs_and_config(arguments)
        ranks = one_batch.SpawnRanks(world_rank=one_batch.spawn_world_rank(arguments, tp_rank=0, pp_rank=0), gpu_id=0)
        one_batch.publish(arguments, role="scheduler", ranks=ranks)
        one_batch._init_process_global_configs()
        one_batch.bootstrap.init_parallel_runtime(server_args=arguments, device="cpu", dist_port=ports.nccl_port)
        _published.append(arguments)
    return arguments, ports


class Runner:
    """One model."""

    def __init__(self, folder: Path) -> None:
        from sglang.benchmark import one_batch
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.runtime_context import get_resources

        arguments, ports = started(folder)
        get_resources().expert_location_metadata = None  # of the model before
        config = ModelConfig.from_server_args(arguments)
        one_batch.bootstrap.init_layer_runtime(model_config=config)
        self.runner = one_batch.ModelRunner(
            model_config=config, mem_fraction_static=0.3, gpu_id=0, nccl_port=ports.nccl_port, server_args=_published[0]
        )
        self.runner.alloc_memory_pool()
        self.runner.init_attention_backends()
        self.runner.init_cuda_graphs()

    @property
    def model(self) -> Any:
        return self.runner.model

    @property
    def updater(self) -> Any:
        return self.runner.weight_updater

    def logits(self) -> Tensor:
        """Of the token after the prompt, ``[1, vocabulary]``."""
        from sglang.benchmark import one_batch

        self.runner.req_to_token_pool.clear()
        self.runner.token_to_kv_pool_allocator.clear()
        request = one_batch.Req(
            rid=0,
            origin_input_text="",
            origin_input_ids=array("q", PROMPT),
            sampling_params=one_batch.SamplingParams(temperature=0, max_new_tokens=1),
        )
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len, request.extend_end = -1, len(PROMPT)
        with torch.no_grad():
            _, logits, _ = one_batch.extend([request], self.runner)
        return logits.float().clone()

    def addresses(self) -> dict[str, int]:
        names = [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers(remove_duplicate=False)]
        return {name: tensor.data_ptr() for name, tensor in names}
