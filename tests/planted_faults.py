"""The faults that :mod:`tests.plant` plants, each with the test files that must catch it. A fault is a patch of source text."""

from __future__ import annotations

from typing import NamedTuple


class Planted(NamedTuple):
    """``old`` becomes ``new`` in ``file`` (below aliasparam/, or with ``of`` below that package); ``tests`` (files below the
    package's tests) must fail."""

    file: str
    old: str
    new: str
    tests: str
    of: str = "aliasparam"


_NVFP4 = "aliasparam_nvfp4"

FAULTS = [
    # storage: who is told, what is counted
    Planted(
        "storage/guarded.py",
        "        self.tell()\n        self.version += 1",
        "        self.version += 1",
        "test_law_01_oracle.py",
    ),
    Planted("storage/guarded.py", "        self.tell()\n        self.version += 1", "        self.tell()", "test_derivations.py"),
    Planted("storage/guarded.py", "            self.states.put_all(State.INVALID, why)\n", "", "test_errors.py"),
    Planted(
        "storage/states.py",
        "            missing[regions[0]] = _INVALID\n",
        "",
        "test_law_10_atomicity.py test_law_10_refusals.py",
    ),
    Planted(
        "storage/kernel_name.py",
        "increment_version((self.tensor, self._ours))",
        "increment_version((self.tensor, self._ours)); self.accept()",
        "test_law_08_no_silent_garbage.py",
    ),
    Planted("storage/guarded.py", "            self.invalidate(self._due)\n", "            pass\n", "reload/test_drain.py"),
    Planted("module/expose.py", "            storage.invalidate_if_due()\n", "", "reload/test_drain.py"),
    Planted("storage/guarded.py", "if self._due is not None:  # not yet", "if True:  # not yet", "reload/test_drain.py"),
    Planted(
        "tensors/geometry.py",
        "    storage.need_writable()  # and what it finds out about the memory counts below\n",
        "",
        "test_exposures.py",
    ),
    Planted("storage/kernel_name.py", "    name._others -= was_written\n", "", "test_law_08_no_silent_garbage.py"),
    Planted(
        "storage/kernel_name.py",
        "        raise name.refusal()",
        "        return func(name.memory)",
        "test_law_08_no_silent_garbage.py",
    ),
    Planted("storage/kernel_name.py", "self.tensor._version > self", "self.tensor._version != self", "test_threads_and_fork.py"),
    Planted(
        "storage/kernel_name.py",
        "self.tensor._version > self._ours._version + self._others",
        "self._ours._version + self._others < self.tensor._version",
        "test_threads_and_fork.py",
    ),
    Planted(
        "storage/kernel_name.py",
        "return self.tensor._version > self._ours._version + self._others",
        "return False",
        "test_law_08_no_silent_garbage.py",
    ),
    # one transaction
    Planted(
        "storage/transaction.py",
        "        part.storage.need_writable()",
        "        pass",
        "test_law_10_atomicity.py test_law_10_refusals.py",
    ),
    Planted("storage/transaction.py", "        part.storage.changing()", "        pass", "test_law_01_oracle.py"),
    Planted(
        "storage/storage.py",
        "            self.clear_unknown(regions)",
        "            pass",
        "test_law_08_no_silent_garbage.py",
    ),
    Planted("storage/transaction.py", "        part.storage.clear_unknown(", "        (", "test_law_08_no_silent_garbage.py"),
    Planted("storage/guarded.py", "if self.states.of(region) is State.INVALID:", "if True:", "test_law_08_no_silent_garbage.py"),
    Planted("storage/storage.py", "self._name(self.buffer, layout)\n", "self.layout = layout\n", "test_retarget.py"),
    Planted("storage/storage.py", "        self.bound.reorder(self", "        0 and self.bound.reorder(self", "test_retarget.py"),
    # shards
    Planted("storage/shards.py", "target = memory[region] if", "target = memory[0] if", "test_law_01_shards.py"),
    Planted("storage/shards.py", "or address <= pointer < address + memory.nbytes", "", "test_views.py"),
    Planted("storage/shards.py", " or view.is_neg()", "", "test_views.py"),
    Planted("storage/shards.py", " or value.is_neg()", "", "test_law_01_shards.py"),
    Planted("storage/shards.py", " or view.is_conj()", "", "test_views.py"),
    Planted("storage/shards.py", "value.is_conj() or ", "", "test_law_01_shards.py"),
    Planted("tensors/call.py", "            return work_that_is_done()\n", "", "test_collectives.py"),
    Planted("tensors/call.py", "        if name is not None:  # torch", "        if False:  # torch", "test_collectives.py"),
    Planted("storage/shards.py", "kept.get(form) or _found", "_found", "test_law_01_shards.py"),
    Planted("storage/shards.py", "or region + shard.regions[-1] >= bound.regions", "", "test_law_01_shards.py"),
    Planted("storage/shards.py", "box = *((0, 1) for _ in ones), *place.box", "box = place.box", "test_law_01_shards.py"),
    Planted("layout/bound.py", "            value = in_bytes(value)\n", "", "test_law_01_shards.py"),
    Planted(
        "module/expose.py", "            storage.changing()\n", "            storage.unexpose()\n", "test_law_10_atomicity.py"
    ),
    Planted(
        "storage/states.py",
        "                if not found.whole:\n",
        "                if False:\n",
        "test_law_01_shards.py",
    ),
    # views and operators
    Planted("tensors/geometry.py", "    view = torch._neg_view(view) if neg else view\n", "", "test_views.py"),
    Planted("tensors/geometry.py", "return view.conj() if conj else view", "return view", "test_views.py"),
    Planted("tensors/geometry.py", "pairs[0][0] if len(pairs) == 1 else storage.geometry", "pairs[0][0]", "test_views.py"),
    Planted("tensors/geometry.py", "raw[: raw.numel() // width * width]", "raw", "test_views.py"),
    Planted(
        "storage/place.py",
        "value.permute(sorted(range(len(self.order)), key=self.order.__getitem__))",
        "value.permute(self.order)",
        "test_views.py test_law_01_oracle.py",
    ),
    Planted(
        "tensors/dispatch.py",
        "        if call.overwrites:  #",
        "        if call.overwrites and len(written) == 1:  #",
        "test_law_01_oracle.py",
    ),
    Planted(
        "tensors/dispatch.py",
        "            if shares_memory(value, storage.buffer):\n                value = value.clone()",
        "",
        "test_views.py",
    ),
    Planted(
        "tensors/dispatch.py",
        "raise _reshaped(target, value)",
        "value = value.flatten()[: view.numel()].view(view.shape)",
        "test_adoption.py test_errors.py",
    ),
    Planted("tensors/dispatch.py", "make(once(view)).expand(view.shape)", "make(view)", "test_views.py"),
    Planted("tensors/faces.py", "        array.flags.writeable = False\n", "", "test_parameter_faces.py"),
    Planted("tensors/faces.py", "        return read_only(copied, self) if", "        return copied if", "test_views.py"),
    Planted(
        "tensors/faces.py", "        return storage.blank_storage", "        return super().untyped_storage()", "test_faces.py"
    ),
    Planted("tensors/faces.py", "    tensor._alias_pin = weakref.ref(tensor)", "    pass", "test_parameter_faces.py"),
    # modules
    Planted("module/adopt.py", "        finish_moves(registry)\n", "", "test_law_10_atomicity.py test_law_10_refusals.py"),
    Planted("module/names.py", "                kernel.put_back()", "                pass", "test_adoption.py"),
    Planted("module/planning.py", "        self.version += 1\n", "", "test_derivations.py test_retarget.py"),
    Planted(
        "module/planning.py", "        self.seen = versions\n", "", "test_engine_contracts.py test_law_08_no_silent_garbage.py"
    ),
    Planted("module/registry.py", "            self.need_loaded()\n", "", "test_errors.py"),
    Planted("module/names.py", "tensor._version != version or", "", "test_law_08_no_silent_garbage.py"),
    Planted(
        "module/names.py",
        "        self._show(ready=False)\n        self.readiness = OPEN",
        "        self.readiness = OPEN",
        "test_law_01_oracle.py",
    ),
    Planted("module/verbs.py", "readiness is not READY or", "readiness is None or", "reload/test_drain.py"),
    Planted("module/planning.py", "encode(values).view(self.plan.kernel.dtype)", "encode(values)", "test_law_01_oracle.py"),
    Planted(
        "module/planning.py",
        "for name in d.sources if name not in known",
        "for name in ()",
        "test_derivations.py test_errors.py",
    ),
    Planted(
        "storage/guarded.py",
        "            self.before_write()\n            self._writer",
        "            self._writer",
        "test_exposures.py test_law_10_refusals.py test_law_10_atomicity.py",
    ),
    Planted(
        "module/containers.py",
        "    for held, names, name, thing in slots:",
        "    for held, names, name, thing in ():",
        "test_law_08_no_silent_garbage.py",
    ),
    Planted("module/containers.py", " is not thing or name in held:", " is not thing:", "test_law_08_no_silent_garbage.py"),
    Planted(
        "storage/transaction.py",
        "value=landable(part.value, part.storage.elements)",
        "value=part.value",
        "test_law_10_refusals.py",
    ),
    Planted("module/names.py", "if not is_same_name(tensor, b.parameter)]", "if tensor is None]", "test_adoption.py"),
    Planted("module/names.py", " + [b.name for b in self.left()]", "", "test_adoption.py"),
    Planted("module/names.py", "found = slots + (self._reached or []),", "found = slots,", "test_adoption.py"),
    Planted("module/names.py", "binding.below = binding.below or id", "binding.below = id", "test_adoption.py"),
    Planted("module/containers.py", " or name in module.__dict__:  # an attribute", ":  #", "test_adoption.py"),
    Planted("module/names.py", "            return commit  #", "            return None  #", "test_threads_and_fork.py"),
    Planted(
        "module/names.py",
        "self._commit(versions)\n\n    def commit_source",
        "self._commit(self._versions())\n\n    def commit_source",
        "test_threads_and_fork.py",
    ),
    Planted("module/containers.py", "value if value.is_meta else kernel.other()", "value", "test_law_08_compiled_callers.py"),
    Planted("module/containers.py", "            owner.look()", "            pass", "test_law_08_compiled_callers.py"),
    Planted("module/containers.py", "if owner.moment != moment:", "if False:", "test_threads_and_fork.py"),
    Planted(
        "storage/kernel_name.py",
        "self.memory.clone(), self.was_written)",
        "self.memory, self.was_written)",
        "test_threads_and_fork.py",
    ),
    Planted("module/verdict.py", "return Reason.LOSSY", "return Reason.SAME", "test_verdicts.py"),
    Planted("module/allocate.py", "not is_alone(memory)", "False", "test_verdicts.py"),
    Planted(
        "report/rows.py",
        "    held, allocated = (0, 0) if tied else",
        "    held, allocated = (0, 0) if False else",
        "test_verdicts.py test_derivations.py",
    ),
    Planted(
        "tensors/parameter.py",
        "    old.__dict__.update(ours)\n",
        "    old.__dict__.update({**ours, '_alias_geometry': None})\n",
        "test_threads_and_fork.py",
    ),
    Planted("ported.py", "    derived_value = _landable(derived_value)\n", "", "test_ported_helpers.py"),
    Planted(
        "ported.py",
        "        storage.put_foreign(value)",
        "        storage.kernel_name.memory.copy_(value)",
        "test_ported_helpers.py",
    ),
    Planted("module/names.py", "one.seen == (before,) and", "", "test_ported_helpers.py"),
    Planted("ported.py", "    source.undeclared = True  # before", "    # before", "test_ported_helpers.py"),
    Planted("module/registry.py", " or source.undeclared:", ":", "test_ported_helpers.py"),
    Planted("tensors/faces.py", "None) == writes_counted(value)", "None) is not None", "test_parameter_faces.py"),
    Planted("tensors/call.py", 'namespace == "aten" and ', "", "test_views.py"),
    Planted(
        "reload/journal.py",
        "            self.storage.accept(self.state)",
        "            self.storage.accept()",
        "test_ported_helpers.py",
    ),
    # the kit
    Planted(
        "testing/_probe.py",
        "    if not all(torch.equal(as_bytes(t), v)",
        "    if False and not all(torch.equal(as_bytes(t), v)",
        "kit/test_kit.py",
    ),
    Planted("testing/_run.py", "        self._addresses_stay()\n", "", "kit/test_kit.py"),
    # layouts and how they are executed
    Planted("layout/triton_sum.py", "inner += byte * i", "inner += byte", "test_triton_copy.py"),
    Planted(
        "layout/triton_copy.py",
        "row = program % ((M + BM - 1) // BM) * BM",
        "row = program % (M // BM) * BM",
        "test_triton_copy.py",
    ),
    Planted("layout/triton_copy.py", "_ACROSS = 8", "_ACROSS = 128", "test_triton_copy.py"),
    Planted("layout/execute.py", "return Copy(dtype, sizes,", "Copy(dtype, sizes,", "test_law_01_shards.py"),
    Planted(
        "layout/digits.py",
        "found[-1].kernel == axis.kernel * axis.size and found",
        "found",
        "test_law_11_layout.py test_law_11_elements.py",
    ),
    Planted("layout/digits.py", "[*first.digits[:1], *ends]", "first.digits", "test_law_11_layout.py"),
    Planted("layout/digits.py", "if ragged and tail and not head and step > 0", "if ragged and tail", "test_law_11_layout.py"),
    Planted("layout/blocks.py", "if padding != other:", "if False:", "test_law_11_layout.py"),
    Planted("layout/blocks.py", "len(found) == len(runs) == 1 and None not in runs", "len(found) == 1", "test_law_11_layout.py"),
    Planted("layout/blocks.py", "if axis.kernel == axis.value", "if axis.size > 1", "test_law_11_layout.py"),
    Planted("layout/trace.py", "    if not bool(wrong.any()):\n", "    if False:\n", "test_law_11_infer.py"),
    Planted("layout/trace.py", "torch.equal(shuffled[shuffled > 0]", "torch.equal(moved[moved > 0]", "test_law_11_infer.py"),
    Planted("layout/trace.py", "(padding, source != 0,", "(padding, first != 0,", "test_law_11_infer.py"),
    # sources and streams
    Planted(
        "reload/delta_apply.py",
        "new = change.of(new)",
        "new = change.of(old)",
        "reload/test_law_12_apply_delta.py",
    ),
    Planted("reload/delta_apply.py", "digest.change(old, new, at)", "pass", "reload/test_law_12_apply_delta.py"),
    Planted(
        "reload/delta_apply.py",
        "places[differs], old[differs]",
        "places[differs], new[differs]",
        "reload/test_law_12_apply_delta.py",
    ),
    Planted("reload/drain.py", "del tops[threading.get_ident()]", "pass", "reload/test_drain.py"),
    Planted("reload/policies.py", "            self._journal.look_again()", "            pass", "reload/test_policies.py"),
    Planted("reload/staged.py", "chunk.used += _aligned(part.nbytes)", "pass", "reload/test_staged.py"),
    Planted("reload/staged.py", "if nbytes > CHUNK // 2:", "if False:", "reload/test_staged.py"),
    Planted("reload/staged.py", "placed.append((", "self._values.append((", "reload/test_staged.py"),
    Planted(
        "reload/policies.py",
        "not (memory := self._journal.touch(target)).ahead",
        "False",
        "reload/test_law_10_second_tries.py",
    ),
    Planted("reload/policies.py", "isinstance(value, _Aliased):", "False:", "reload/test_law_10_second_tries.py"),
    Planted("reload/journal.py", "        self.look_again()\n", "", "reload/test_law_10_second_tries.py"),
    Planted("reload/journal.py", "if self.changed() is not None:", "if False:", "reload/test_law_12_apply_delta.py"),
    Planted("reload/journal.py", "self.need_unchanged()  #", "pass  #", "reload/test_law_12_apply_delta.py"),
    Planted(
        "reload/journal.py",
        "            self._accept()\n            for patch",
        "            for patch",
        "reload/test_law_12_apply_delta.py",
    ),
    Planted("reload/journal.py", "if memory.patches or memory.lost", "if memory.patches", "reload/test_law_12_apply_delta.py"),
    Planted("reload/journal.py", "why = self.lost or self.changed()", "why = self.lost", "reload/test_law_10_second_tries.py"),
    Planted("reload/policies.py", "with writing(target.tensor):", "with writing(value):", "reload/test_kinds.py"),
    Planted("reload/patch.py", "with writing(self.live.tensor):", "with torch.no_grad():", "reload/test_kinds.py"),
    Planted(
        "reload/journal.py",
        "self.begun, self.version = True, None",
        "self.begun = True",
        "reload/test_law_10_second_tries.py",
    ),
    Planted("reload/drain.py", "if not safe:", "if False:", "reload/test_drain.py"),
    Planted("reload/drain.py", "with collector_paused():", "if True:", "reload/test_drain.py"),
    Planted(
        "reload/claims.py",
        "with _taking:\n            declared",
        "if True:\n            declared",
        "reload/test_session_others.py",
    ),
    Planted("reload/session.py", "if not self._aborting.acquire(blocking=False):", "if False:", "reload/test_session_others.py"),
    Planted("reload/session.py", "if self.phase is not Phase.COMMITTED:", "if True:", "reload/test_law_10_second_tries.py"),
    Planted("reload/loading.py", "        made.clear()", "        pass", "reload/test_loading.py"),
    Planted("reload/delta.py", "if self._stream.size not in", "if None not in", "reload/test_malformed_deltas.py"),
    Planted("reload/session.py", "self._claim.lend()  #", "self._claim.end()  #", "reload/test_session_others.py"),
    Planted("reload/claims.py", "with _taking:  # whoever", "if True:  # whoever", "reload/test_session_others.py"),
    Planted(
        "reload/session.py", "self._reopen()  # of what was", "self._claim.hold()  # of what was", "reload/test_session_others.py"
    ),
    Planted("reload/ranks_store.py", "if last[0] == asked:", "if asked is not None:", "reload/test_ranks_store.py"),
    Planted("reload/live_digest.py", "if one.version != versions[name]:", "if False:", "reload/test_law_12_live_digest.py"),
    Planted("reload/sources.py", "        self.bytes_read += values.nbytes\n", "", "reload/test_sources.py"),
    Planted("reload/sources.py", "if len(coming) == len(slots):", "if len(coming) == len(slots) + 1:", "reload/test_sources.py"),
    Planted("reload/policies.py", "        self._need_agreement()\n", "", "reload/test_session_others.py"),
    Planted("reload/policies.py", "        if target.shares_memory:", "        if False:", "reload/test_session_others.py"),
    Planted("reload/policies.py", "self._begun.pop(key, None)", "pass", "reload/test_drain.py"),
    Planted("reload/loading.py", "in targets[name].together:", "in [targets[name]]:", "reload/test_loading.py"),
    Planted("reload/stream.py", 'elif answer.get("number") != self._sent - 1:', "elif False:", "reload/test_stream.py"),
    # NVFP4
    Planted(
        "quantize/block_scales.py",
        "        if low < 0 or high == 0x7F:",
        "        if high == 0x7F:",
        "test_scales.py",
        _NVFP4,
    ),
    Planted("quantize/global_scale.py", " & torch.isfinite(1 / values)", "", "cli/test_inspect.py test_linear.py", _NVFP4),
    Planted("layouts/lines.py", "-> ~h i a k c", "-> h i a k c", "test_lines.py", _NVFP4),
    Planted(
        "integrations/transformers/shared_call.py",
        "    if of is not x or when != state or index not in parts:",
        "    if of is not x or index not in parts:",
        "test_fused_projections.py",
        _NVFP4,
    ),
    Planted(
        "integrations/transformers/shared_call.py",
        "        frame = _running.get()\n        if frame is not None",
        "        frame = None\n        if frame is not None",
        "test_fused_projections.py",
        _NVFP4,
    ),
    Planted(
        "integrations/transformers/reload.py",
        "        need_equal(tied_names(model, _names(model).ours), source, specs)\n",
        "",
        "test_transformers_ties.py",
        _NVFP4,
    ),
    Planted(
        "integrations/transformers/ties.py",
        "read(source, box).to(dtype)",
        "read(source, box).to(read(name, box).dtype)",
        "test_transformers_ties.py",
        _NVFP4,
    ),
    # what inspect says
    Planted(
        "integrations/transformers/scales.py",
        "        except AliasError as error:\n            yield error",
        "        except AliasError:\n            pass",
        "cli/test_inspect_scales.py",
        _NVFP4,
    ),
    Planted("cli/verify_folder.py", "] and otherwise is None", "]", "cli/test_serve.py", _NVFP4),
    Planted("arrival.py", "one.values.mT if weight.columns else one.values", "one.values", "test_arrival.py", _NVFP4),
    # scales and biases of experts
    Planted("moe/biases.py", "-1) / factors.view", "-1) * factors.view", "test_moe_biases.py", _NVFP4),
    Planted(
        "moe/biases.py", "        own, w2 = (_PLAIN, _PLAIN) if self.raw else", "        own, w2 =", "test_moe_biases.py", _NVFP4
    ),
    Planted("layouts/lines.py", '-> i g a ~h b"', '-> i g a h b"', "test_moe_biases.py", _NVFP4),
    Planted("layouts/lines.py", '-> ~h i a"', '-> h i a"', "test_moe_biases.py", _NVFP4),
    Planted(
        "moe/runners/_base.py",
        "None if first is None or shape.tp_rank else",
        "None if first is None else",
        "test_moe_biases.py",
        _NVFP4,
    ),
    Planted("moe/runners/flashinfer_cutlass.py", "tp_rank=shape.tp_rank", "tp_rank=0", "test_moe_biases.py", _NVFP4),
    Planted("moe/loader.py", 'share = Share() if shard_id == "w2" else share', "pass", "test_moe_biases.py", _NVFP4),
    Planted(
        "moe/global_scales.py",
        '        self._need("what a kernel',
        '        0 and self._need("what a kernel',
        "test_moe_bad_input.py",
        _NVFP4,
    ),
    Planted("moe/folder.py", "        self._derive(scalars)\n", "", "test_moe_folder.py", _NVFP4),
    Planted(
        "quantize/missing.py",
        "    largest = scales[good].min() if reciprocal else scales[good].max()",
        "    largest = scales[good].max()",
        "test_missing_input_scale.py",
        _NVFP4,
    ),
    Planted("cli/verify_engine.py", '"held": same != differs', '"held": same', "cli/test_verify_engine.py", _NVFP4),
    Planted(
        "integrations/transformers/fuse.py",
        'yield child, "kernel", [child]',
        'yield parent, f"kernel{len(parent._modules)}", [child]',
        "test_transformers_structures.py",
        _NVFP4,
    ),
    Planted(
        "integrations/transformers/files_read.py",
        "    if ours and ours != theirs:\n",
        "    if not ours:\n",
        "test_transformers_files.py",
        _NVFP4,
    ),
    Planted(
        "checkpoint/_compressed_tensors.py", "targets = sorted(named)", "targets = list(named)", "test_quant_config.py", _NVFP4
    ),
    # weights quantized on arrival
    Planted("arrival.py", "place.box[: storage.bound.lead]", "place.box", "test_arrival.py", _NVFP4),
    Planted("arrival.py", "not bool(largest.isfinite().all())", "bool(largest.isnan().any())", "test_arrival.py", _NVFP4),
    Planted("arrival.py", "value.new_empty(weight.shape)", "value", "test_arrival.py", _NVFP4),
    Planted("arrival.py", "        if not is_new:", "        if is_new is None:", "test_arrival.py", _NVFP4),
    Planted("arrival.py", "if bool((largest > limit", "if bool((largest < -limit", "test_arrival.py", _NVFP4),
    Planted("arrival.py", "each = weight.columns and live.numel() > 1", "each = False", "test_arrival.py", _NVFP4),
]
