"""What a quantization config means: ModelOpt's and compressed-tensors' spellings, and patterns by the thousand."""

from __future__ import annotations

import re
import time
import warnings
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aliasparam_nvfp4.checkpoint import QuantConfig
from aliasparam_nvfp4.checkpoint.patterns import Patterns

FOUR = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
EIGHT = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
UP = "model.layers.0.mlp.up_proj"


def by_modelopt(name: str, pattern: str) -> bool:
    """SGLang's rule, pattern by pattern."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    parts = name.split(".")
    return any(fnmatchcase(tried, pattern) for tried in (*(".".join(parts[: i + 1]) for i in range(len(parts))), *parts))


def by_compressed_tensors(name: str, pattern: str) -> bool:
    return re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern == name


WORDS = st.sampled_from(["layers", "mlp", "experts", "3", "12", "self_attn", "q_proj", "_proj", "1", "lay"])
JOINTS = st.sampled_from([".", r"\.", ".*", "*", "?", "+", "[0-9]", "(a|q)", "|", "$", "^", "(?:x)?", "[!a]", "{2}", r"\d"])
PATTERNS = st.lists(st.tuples(WORDS, JOINTS), min_size=1, max_size=4).map(lambda pairs: "".join(w + j for w, j in pairs))
PARTS = st.sampled_from(["model", "layers", "3", "12", "a512", "mlp", "experts", "self_attn", "q_proj", "xlayers"])
NAMES = st.lists(PARTS, min_size=1)


@settings(max_examples=400)
@given(text=PATTERNS, start=st.sampled_from(["", "*", "re:.*", "re:"]), parts=NAMES, exact=st.booleans())
def test_looking_patterns_up_finds_what_trying_each_finds(text: str, start: str, parts: list[str], exact: bool) -> None:
    pattern, name = start + text, ".".join(parts)
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error:
            return
    rule = by_compressed_tensors if exact else by_modelopt

    assert (name in Patterns([pattern], exact=exact)) == rule(name, pattern)


@pytest.mark.parametrize(
    ("form", "experts"),
    [("model.layers.{}.mlp.experts.{}", 170), ("*layers.{}.mlp.experts.{}.*", 170),
     (r"re:.*layers\.{}\.mlp\.experts\.{}\..*", 170),
     ("re:model.layers.{}.mlp.experts.{}.*", 200)],  # "17." is also the beginning of "171"
)  # fmt: skip
def test_ten_thousand_patterns_are_quick(form: str, experts: int) -> None:
    patterns = [form.format(layer, expert) for layer in range(30, 90) for expert in range(170)]
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(50) for e in range(200)]
    began = time.process_time()
    known = Patterns(patterns)

    assert sum(name in known for name in names) == 20 * experts
    assert time.process_time() - began < 4  # trying each takes minutes


def schemes(config: dict[str, Any], module: str = UP, **evidence: bool) -> tuple[str, str | None] | None:
    found = QuantConfig.from_dict(config).scheme_of(module, **evidence)
    return None if found is None else (found.algo, found.inputs)


def test_modelopts_spellings_say_the_same() -> None:
    base = {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}
    for config in ({**base, "quant_method": "modelopt"}, {**base, "quant_method": "MODELOPT_FP4"}, {"quantization": base},
                   {"quant_method": "modelopt", "quantization": base}):  # fmt: skip
        assert schemes(config) == ("NVFP4", "stored") and schemes(config, "lm_head") is None
    both = {"quant_algo": "NVFP4", "ignore": ["lm_head"], "modules_to_not_convert": ["*mlp*"]}
    assert schemes(both) is None and schemes(both, "lm_head") is None and schemes(both, "a.q_proj") is not None


def test_a_label_without_activations_in_any_group_goes_by_the_files() -> None:
    group = {"weights": FOUR, "targets": ["Linear"]}
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {"g": group}}
    assert schemes(config, stored=False) == ("W4A16_NVFP4", None)
    assert schemes(config, stored=True) == ("NVFP4", "stored")


@pytest.mark.parametrize(
    "entry",
    ["m.experts", "m.experts.gate_up_proj", "m.experts.3.up_proj", "m.*", "m.experts.3.gate_up_proj"],
)
def test_entries_of_a_mixed_checkpoint_stand_for_the_parts_of_what_they_name(entry: str) -> None:
    layers = {entry: {"quant_algo": "NVFP4_AWQ"}, "a.qkv_proj": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}}
    config = {"quant_method": "modelopt_mixed", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}

    assert schemes(config, "m.experts.3.up_proj") == ("NVFP4", "stored")
    assert schemes(config, "a.k_proj") == ("FP8", "token")
    assert schemes(config, "b.k_proj") is None


def test_an_entry_without_an_algorithm_leaves_its_module_alone() -> None:
    layers = {"m.mlp": {"quant_algo": "NVFP4"}, "m.mlp.gate": {"quant_algo": None}}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}

    assert schemes(config, "m.mlp.up_proj") == ("NVFP4", "stored") and schemes(config, "m.mlp.gate") is None


def test_compressed_tensors_names_count_before_expressions_and_those_before_classes() -> None:
    groups = {
        "a": {"targets": ["Linear"], "weights": FOUR, "input_activations": {**FOUR, "dynamic": "local"}},
        "b": {"targets": ["re:.*mlp.*"], "weights": EIGHT, "input_activations": {**EIGHT, "strategy": "token", "dynamic": True}},
        "c": {"targets": [UP], "weights": FOUR, "input_activations": None},
    }  # fmt: skip
    config = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["model.x", "re:.*y$"]}

    assert schemes(config) == ("W4A16_NVFP4", None)
    assert schemes(config, "model.layers.0.mlp.down_proj") == ("FP8", "token")
    assert schemes(config, "model.layers.0.mlp.down_proj", fp4=True) == ("NVFP4", "stored"), "the files' weight decides"
    assert schemes(config, "model.x.q_proj") == ("NVFP4", "stored"), "a parent exempts nothing"
    assert schemes(config, "model.x") is None and schemes(config, "a.y") is None


_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate")
HELD = ("lm_head", *(f"model.layers.{n}.{part}" for n in (0, 1, 10) for part in _PARTS))
TARGETS = st.sampled_from([
    "Linear", "lm_head", "re:.*q_proj$", "re:.*gate", "re:.*self_attn.*", "re:.*(q|k)_proj", "re:model.layers.1.*", "re:lm_head",
    r"re:.*layers\.(0|10)\.", r"re:.*layers\.1\..*", "model.layers.1", "model.layers.1.mlp.gate", "re:mlp", "q_proj", "*gate*",
    "re:",
])  # fmt: skip


@settings(max_examples=60)
@given(
    groups=st.lists(st.tuples(st.lists(TARGETS, min_size=1, max_size=3, unique=True), st.booleans()), min_size=1, max_size=3),
    ignore=st.lists(TARGETS, max_size=3, unique=True),
)
def test_of_groups_that_match_compressed_tensors_own_choice_is_taken(
    groups: list[tuple[list[str], bool]], ignore: list[str]
) -> None:
    theirs = pytest.importorskip("compressed_tensors.quantization")
    parts = {
        f"group_{n}": {"targets": targets, "weights": {**(EIGHT if eight else FOUR), "dynamic": False}, "input_activations": None}
        for n, (targets, eight) in enumerate([(["re:nothing"], False), *groups])
    }
    model = nn.Module()
    for path in HELD:
        held = model
        for name in path.split(".")[:-1]:
            if name not in held._modules:
                held.add_module(name, nn.Module())
            held = held.get_submodule(name)
        held.add_module(path.rpartition(".")[2], nn.Linear(16, 16, device="meta"))
    config = {"format": "mixed-precision", "quantization_status": "initialized", "config_groups": parts, "ignore": ignore}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.apply_quantization_config(model, theirs.QuantizationConfig(**config))
    read = QuantConfig.from_dict({"quant_method": "compressed-tensors", **config})

    for path in HELD:
        scheme = getattr(model.get_submodule(path), "quantization_scheme", None)
        bits = None if scheme is None else scheme.weights.num_bits
        ours = read.scheme_of(path)
        assert (None if ours is None else 4 if ours.is_fp4 else 8) == bits, path
