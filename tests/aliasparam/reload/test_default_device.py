"""Host memory is on the host, whatever device is torch's default: engines load within ``torch.device("cuda")`` (law 1)."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from aliasparam import apply_delta, checkpoint_digest, checkpoint_state_dict, reload
from aliasparam.reload import digest_of_folder
from aliasparam.reload.delta_writer import diff
from aliasparam.reload.policies import PolicyName
from aliasparam.reload.sources import SafetensorsFolder

from .live_models import Whole, changed, folder_of, raw

OLD = checkpoint_state_dict(Whole())
NEW = changed(changed(OLD, 0.1, 0), 0.1, 1)


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_law_1_a_reload_under_another_default_device(policy: PolicyName, tmp_path: Path) -> None:
    model, files = Whole(), folder_of(tmp_path / "new", NEW)
    with torch.device("meta"), SafetensorsFolder(files) as folder:
        with reload(model, policy=policy) as session:
            session.load((name, folder.read(name)) for name in folder.tensors)
        assert checkpoint_digest(model) == digest_of_folder(files)
        again = reload(model, policy=policy)
        again.begin()
        again.load(OLD)
        again.prepare()
        again.switch()
        again.abort() if policy.endswith("journal") else again.commit()
    assert raw(checkpoint_state_dict(model)) == raw(NEW if policy.endswith("journal") else OLD)


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_law_12_a_delta_under_another_default_device(encoding: str, tmp_path: Path) -> None:
    model, files = Whole(), folder_of(tmp_path / "new", NEW)
    with torch.device("meta"), SafetensorsFolder(files) as folder:
        diff(OLD, folder, tmp_path / "delta", 1, 0, encoding=encoding)
        assert apply_delta(model, tmp_path / "delta") == 1
    assert raw(checkpoint_state_dict(model)) == raw(NEW)
