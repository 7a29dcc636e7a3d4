"""``serve``: a model over HTTP, reloaded while it serves."""

from __future__ import annotations

import errno
import ipaddress
import secrets
import socket
from typing import Annotated

import typer

from .guard import about
from .models import load
from .options import Backend, Folder, Missing, Runner, need_backends
from .output import say

_TOKEN = "ALIASPARAM_TOKEN"


def serve(
    folder: Folder,
    backend: Backend = "auto",
    moe_backend: Runner = "auto",
    missing_input_scale: Missing = "refuse",
    host: Annotated[str, typer.Option(help="Address to listen on; loopback unless you say otherwise.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar=_TOKEN, help="Asked of every request; without, one is made and printed.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; the folder's name without.")] = None,
) -> None:
    """Serve OpenAI's API (chat completions, completions, models), and POST /reload, /delta, /digest, GET /memory, /health."""
    need_backends(backend, moe_backend, missing_input_scale)
    from ..demo._quiet import need

    need("fastapi", "uvicorn", "openai", "transformers", "accelerate", extra="serve")
    secret = _token(token)
    with _bound(host, port) as listener:  # a port that is taken fails before a model is loaded
        model, tokenizer = load(folder, backend, moe_backend, missing_input_scale)
        import uvicorn

        from .server import build

        called = name or folder.resolve().name
        app = build(model, tokenizer, called, secret, folder)
        # Errors are answers (server.py); what uvicorn logs besides is about requests that are cut off when it ends.
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2))
        where, number = listener.getsockname()[:2]
        url = f"http://{f'[{where}]' if ':' in where else where}:{number}"
        with about(url):
            listener.listen()  # whoever reads the next line may connect
        say(f"serving {called} at {url}/v1" + ("" if token else f"\ntoken: {secret}"))
        if not ipaddress.ip_address(where).is_loopback:
            say("other machines can reach it: whoever has the token can load any folder of this one; the traffic is plain HTTP")
        server.run(sockets=[listener])


def _token(given: str | None) -> str:
    from aliasparam.errors import AliasError

    if given is None:
        return secrets.token_urlsafe(16)
    if not given.strip() or not given.isascii() or not given.isprintable() or " " in given:
        raise AliasError("this is no token", name=_TOKEN, expected="printable ASCII without spaces")
    return given


def _bound(host: str, port: int) -> socket.socket:
    """A socket on the first address of ``host``, to which nobody can connect yet.

    Raises:
        OSError: names the address.
    """
    with about(f"{host}:{port}"):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except UnicodeError as error:
            raise OSError(errno.EINVAL, str(error)) from None
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    return bound
