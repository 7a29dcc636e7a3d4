"""Layouts in which trainers publish: stitch's board beside slime's folders. Bytes are those of the receivers' own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aliasparam import apply_delta, checkpoint_digest, checkpoint_state_dict, process
from aliasparam.reload.delta_folder import Chain, open_version
from aliasparam.reload.errors import SourceError
from aliasparam.reload.published import newest

from .delta_cases import trainer_writes
from .live_models import Whole, changed, folder_of, raw

A = checkpoint_state_dict(Whole())
B = changed(A, 0.05, 0)
C = changed(B, 0.3, 1)


def manifest(folder: Path, number: int, **fields: Any) -> None:
    """As stitch's ``VersionManifest.from_slime_index`` lifts it from an index, and ``write`` writes it."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    said = {key: index["metadata"].get(key) for key in ("delta_encoding", "compression_format", "checksum_format")}
    written = {
        "protocol_version": 1,
        "version": number,
        "base_version": int(index["metadata"]["base_version"]),
        "backend": "disk_delta",
        "load_format": "auto",
        "transition_files": files,
        "artifacts": [{"kind": "transition", "path": name, "size_bytes": (folder / name).stat().st_size} for name in files],
        "created_at": 1.5,
        "metadata": {"trainer": "slime", "transport": "disk"},
        **said,
        **fields,
    }
    (folder / "manifest.json").write_text(json.dumps(written, sort_keys=True) + "\n")


def board(root: Path) -> Path:
    """Stitch's own layout: versions 1 and 2, deltas."""
    for version, (old, new) in enumerate([(A, B), (B, C)], 1):
        folder = trainer_writes(root / "versions" / f"weight_v{version:06d}", raw(old), raw(new), version, "xor", "xxh3-128", 2)
        manifest(folder, version)
    (root / "latest.json").write_text(json.dumps({"protocol_version": 1, "version": 2, "updated_at": 1.5}) + "\n")
    return root


def run(root: Path) -> Path:
    """Slime's folders under a run, with stitch's pointer."""
    folder_of(root / "run-7" / "weight_v000001", B)
    trainer_writes(root / "run-7" / "weight_v000002", raw(B), raw(C), 2, "overwrite", "adler32")
    (root / "latest").write_text("run-7/weight_v000002")
    return root


def flat(root: Path) -> Path:
    trainer_writes(root / "weight_v000001", raw(A), raw(B), 1, "xor", "adler32")
    trainer_writes(root / "weight_v000002", raw(B), raw(C), 2, "xor", "adler32")
    (root / "latest").write_text("000002\n")
    return root


@pytest.mark.parametrize("layout", [board, run, flat])
def test_law_12_a_receiver_comes_to_the_newest_version(layout: Any, tmp_path: Path) -> None:
    model, cold = Whole(), Whole()
    source, version = newest(layout(tmp_path))
    assert version == 2
    with Chain(source, applied=0, target=version) as chain:
        assert apply_delta(model, chain, serving=0) == 2
    cold.load_state_dict(C, strict=False)
    process(cold)
    assert checkpoint_digest(model) == checkpoint_digest(cold)


def test_the_pointer_says_which_version_is_meant(tmp_path: Path) -> None:
    root = board(tmp_path)
    (root / "latest.json").write_text('{"version": 1}')  # rewound
    assert newest(root) == (root, 1)
    (root / "latest.json").unlink()
    assert newest(root) == (root, 2)  # by the folders
    assert newest(run(tmp_path / "other")) == (tmp_path / "other" / "run-7", 2)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("latest", ""), ("latest", "newest"), ("latest", "../elsewhere/weight_v000001"), ("latest", "/etc/weight_v000001"),
        ("latest", "run/../../weight_v000001"), ("latest", "weight_v"), ("latest", "weight_v000001" * 400),
        ("latest", "weight_v-1"),
        ("latest.json", ""), ("latest.json", "[]"), ("latest.json", "{}"), ("latest.json", '{"version": "2"}'),
        ("latest.json", '{"version": true}'), ("latest.json", '{"version": -1}'),
        ("latest.json", '{"version": 2, "protocol_version": 2}'),
        ("latest.json", '{"version": 1, "version": 2}'), ("latest.json", '{"version": 2' + " " * 5000 + "}"),
    ],
)  # fmt: skip
def test_a_pointer_that_cannot_be_read_is_refused(file: str, text: str, tmp_path: Path) -> None:
    root = board(tmp_path)
    (root / "latest.json").unlink()
    (root / file).write_text(text)
    with pytest.raises(SourceError, match=rf"{file}.*: (the pointer|its JSON|a name is there twice|the file is too long)"):
        newest(root)


MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "another protocol": (
        {"protocol_version": 3, "codec_profile": "snappy-independent-1mib-zstd-v1"},
        r"another protocol\n.*protocol_version 1.*\n.*3, codec 'snappy-independent",
    ),
    "another version": ({"version": 3}, r"manifest.json: version: the manifest and its version disagree\n.*2\n.*3"),
    "no version": ({"version": None}, "version: the manifest and its version disagree"),
    "another base": ({"base_version": 0}, "base_version: the manifest"),
    "another encoding": ({"delta_encoding": "overwrite"}, "delta_encoding: the manifest"),
    "another checksum": ({"checksum_format": "adler32"}, "checksum_format: the manifest"),
    "another file": ({"transition_files": ["model.safetensors"]}, "transition_files: the manifest"),
    "files that are none": ({"transition_files": {"a": 1}}, "transition_files: the manifest"),
    "another size": (
        {"artifacts": [{"kind": "transition", "path": "model-00000-of-00002.safetensors", "size_bytes": 3}]},
        r"size_bytes of model-00000-of-00002.safetensors: the manifest",
    ),
    "artifacts that are none": ({"artifacts": ["model.safetensors"]}, "artifacts: the manifest"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_says_something_else_is_refused(case: str, tmp_path: Path) -> None:
    fields, message = MANIFESTS[case]
    root = board(tmp_path)
    open_version(root, 2).close()
    manifest(root / "versions" / "weight_v000002", 2, **fields)
    with pytest.raises(SourceError, match=message):
        Chain(root, 0, 2)


@pytest.mark.parametrize("base", ["\u00b2", "9" * 5000])
def test_a_base_that_is_no_version_is_none_that_a_manifest_must_name(base: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "weight_v000001", B)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"base_version": base}, "weight_map": dict.fromkeys(B, "model.safetensors")})
    )
    (folder / "manifest.json").write_text(json.dumps({"protocol_version": 1, "version": 1}))
    Chain(tmp_path, 0, 1).close()


def test_a_manifest_may_leave_out_what_the_index_says(tmp_path: Path) -> None:
    root = board(tmp_path)
    written = {"protocol_version": 1, "version": 2, "base_version": 1}
    (root / "versions" / "weight_v000002" / "manifest.json").write_text(json.dumps(written))
    Chain(root, 0, 2).close()
    (root / "versions" / "weight_v000002" / "manifest.json").write_text("{")
    with pytest.raises(SourceError, match="its JSON cannot be read"):
        Chain(root, 0, 2)
