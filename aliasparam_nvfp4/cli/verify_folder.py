"""``verify --folder``: that what serves is this folder, by digests; no weights are moved."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from aliasparam.errors import AliasError
from aliasparam.reload.digest import new_digest

from ..checkpoint import QuantConfig
from .digest import folder_digest, model_digest

_TOKEN = "ALIASPARAM_TOKEN"


def compare(folder: Path, server: str | None, kind: str) -> dict[str, Any]:
    """The folder's digest beside that of a server (its ``/digest``), or of a model that is loaded from the folder here.

    Returns:
        ``held``, ``digest``, ``serves`` and ``differing``: names whose digests differ, or that one side alone has; and
        ``otherwise``: how the server computes with the same bytes another thing than the folder's config says.

    Raises:
        AliasError: an unknown digest, the folder cannot be read or served, or the server does not answer.
    """
    new_digest(kind)  # refused before anything is loaded
    found = of_server(server, kind, dict(QuantConfig.from_folder(folder).raw)) if server else _of_loaded(folder, kind)
    expected = folder_digest(folder, kind, found["tensors"])
    names = sorted(expected["tensors"].keys() | found["tensors"].keys())
    differing = [name for name in names if expected["tensors"].get(name) != found["tensors"].get(name)]
    otherwise = found.get("otherwise")
    held = found["digest"] == expected["digest"] and otherwise is None
    digests = {"digest": expected["digest"], "serves": found["digest"], "kind": kind}
    return {"held": held, **digests, "differing": differing, "otherwise": otherwise}


def _of_loaded(folder: Path, kind: str) -> dict[str, Any]:
    from .models import load

    return model_digest(load(folder, "auto", "auto")[0], kind)


def of_server(server: str, kind: str, quantization: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a server's ``/digest`` says, also of how it would serve the same bytes under another config.

    Raises:
        AliasError: this is no server's address, or what is there does not answer with a digest.
    """
    if not server.startswith(("http://", "https://")):
        raise AliasError("this is not a server's address", name=server, expected="http://HOST:PORT")
    headers = {"Authorization": f"Bearer {os.environ.get(_TOKEN, '')}", "Content-Type": "application/json"}
    body = json.dumps({"kind": kind, "quantization": quantization}).encode()
    try:
        request = urllib.request.Request(f"{server.rstrip('/')}/digest", body, headers)
        with urllib.request.urlopen(request) as answer:
            found = json.loads(answer.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        remedy = f"Set {_TOKEN} to its token." if isinstance(error, urllib.error.HTTPError) and error.code == 401 else None
        raise AliasError(f"the server does not answer: {error}", name=server, remedy=remedy) from None
    if not isinstance(found, dict) or not isinstance(found.get("tensors"), dict) or "digest" not in found:
        raise AliasError("the server's answer is no digest", name=server, found=repr(found)[:80])
    return found
