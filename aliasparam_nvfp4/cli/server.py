"""The HTTP server: transformers' own OpenAI handlers on a model of ours, and what reloads it."""

from __future__ import annotations

import json
import os
import secrets
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import NoneType
from typing import Any, TypeGuard

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as HttpError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState

from aliasparam import memory_report
from aliasparam.errors import AliasError
from aliasparam.reload.digest import FORMATS

from ..integrations.transformers.reload import served_otherwise
from .delta import delta_once
from .digest import model_digest
from .guard import message_of
from .reload import reload_once
from .turns import Turns

_WHEN = ("idle", "between_tokens")
#: Bytes of a request. A long prompt is a hundredth of it.
_LARGEST_BODY = 16 << 20
#: What handlers raise for a body that is not what OpenAI's API says.
_BAD_BODY = (KeyError, TypeError, ValueError, AttributeError, IndexError, TemplateError)


class _OneModel(ModelManager):  # type: ignore[misc]
    """transformers' model manager with the one model that is loaded already."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self._ours = model, tokenizer
        super().__init__(force_model=name)

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self._ours

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id


def build(model: Any, tokenizer: Any, name: str, token: str, folder: Path) -> FastAPI:
    """The application.

    Args:
        model: loaded through this package, and ``folder`` where from.
        tokenizer: its tokenizer.
        name: what clients call the model.
        token: asked of every request but ``/health``, as ``Authorization: Bearer TOKEN`` (OpenAI clients: ``api_key``).
        folder: shown by ``/v1/models``.
    """
    app = FastAPI(title="aliasparam-nvfp4", docs_url=None, redoc_url=None, openapi_url=None)
    manager, state = _OneModel(model, tokenizer, name), GenerationState()
    served: dict[str, Any] = {"folder": str(folder), "reloads": 0, "version": None}
    model.register_forward_pre_hook(_need_tokens, with_kwargs=True)
    _guard(app, token)
    _openai(app, name, served, ChatCompletionHandler(manager, state), CompletionHandler(manager, state))
    _ours(app, model, Turns(model, state.get_manager(name)), served)
    return app


def _need_tokens(_: Any, __: Any, given: dict[str, Any]) -> None:
    if (ids := given.get("input_ids")) is not None and not ids.numel():
        raise ValueError("the prompt has no tokens")


def _guard(app: FastAPI, token: str) -> None:
    expected = f"Bearer {token}".encode()

    @app.middleware("http")
    async def authorized(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("authorization", "").encode()
        if request.scope["path"] != "/health" and not secrets.compare_digest(given, expected):
            return _error(401, "the token is missing or wrong: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        try:
            return await call_next(request)
        except Exception as error:
            return _error(500, message_of(error))

    @app.exception_handler(HttpError)
    async def refused(_: Request, error: HttpError) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}


def _openai(app: FastAPI, name: str, served: dict[str, Any], chat: Any, completion: Any) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _handled(chat, request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _handled(completion, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "local", **served}]}


def _ours(app: FastAPI, model: Any, turns: Turns, served: dict[str, Any]) -> None:
    @app.post("/reload")
    async def reload(request: Request) -> Response:
        folder, turn = await _asked(request, turns)
        return _answer(await turn(lambda: _noted(reload_once(model, folder), served, folder=str(folder), version=None)))

    @app.post("/delta")
    async def delta(request: Request) -> Response:
        folder, turn = await _asked(request, turns)

        def job() -> dict[str, Any]:
            step = delta_once(model, folder, served["version"])
            return _noted(step, served, folder=f"{served['folder']} + {folder}", version=step["version"])

        return _answer(await turn(job))

    @app.api_route("/digest", methods=["GET", "POST"])
    async def digest(request: Request) -> Response:
        body = await _body(request)
        kind, config = body.get("kind", "adler32"), body.get("quantization")
        if not isinstance(kind, str) or kind not in FORMATS or not isinstance(config, (dict, NoneType)):
            raise HTTPException(400, f'expected {{"kind": {" or ".join(FORMATS)}, "quantization": a config or null}}')

        def job() -> dict[str, Any]:
            otherwise = None if config is None else served_otherwise(model, config)
            return {"folder": served["folder"], "otherwise": otherwise, **model_digest(model, kind)}

        return JSONResponse(await turns.when_idle(job))

    @app.get("/memory")
    async def memory() -> dict[str, Any]:
        report = memory_report(model)
        sizes = {name: getattr(report, name) for name in ("allocated_bytes", "two_copies_bytes", "saved_bytes")}
        return {**sizes, "report": str(report).splitlines()}


async def _asked(request: Request, turns: Turns) -> tuple[Path, Callable[[Callable[[], Any]], Awaitable[Any]]]:
    """The folder of a body, and when it is to be taken."""
    body = await _body(request)
    folder, when = body.get("folder"), body.get("when", "idle")
    if not _is_path(folder) or when not in _WHEN or body.keys() - {"folder", "when"}:
        raise HTTPException(400, f'expected {{"folder": PATH, "when": {" or ".join(_WHEN)}}}')
    return Path(folder), turns.when_idle if when == "idle" else turns.between_tokens


def _is_path(folder: Any) -> TypeGuard[str]:
    """JSON has strings that no path can be: with a NUL, or half a surrogate pair."""
    try:
        return isinstance(folder, str) and folder != "" and b"\0" not in os.fsencode(folder)
    except UnicodeEncodeError:
        return False


def _noted(step: dict[str, Any], served: dict[str, Any], **now: Any) -> dict[str, Any]:
    """What a step came to; ``now`` is served if it went well. Part of the job: the next one may begin before this is answered."""
    if not step["error"]:
        served.update(now, reloads=served["reloads"] + 1)
    return step


def _answer(step: dict[str, Any]) -> Response:
    return _error(409, step["error"]) if step["error"] else JSONResponse(step)


async def _handled(handler: Any, request: Request) -> Response:
    body = await _body(request)
    try:
        answer: Response = await handler.handle_request(body, request.headers.get("x-request-id") or str(uuid.uuid4()))
    except AliasError as error:
        return _error(409, str(error))
    except _BAD_BODY as error:
        return _error(400, f"this cannot be answered: {type(error).__name__}: {error}")
    return answer


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object that was sent, whatever the content type says (curl's default is a form's)."""
    sent, count = bytearray(), 0
    async for piece in request.stream():  # to its end, or the client is cut off before it reads the answer
        count += len(piece)
        if count <= _LARGEST_BODY:
            sent += piece
    if count > _LARGEST_BODY:
        raise HTTPException(413, f"the body is larger than {_LARGEST_BODY >> 20} MiB")
    try:
        body = json.loads(sent or b"{}")
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise HTTPException(400, "the body is not a JSON object")
    return body


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """As OpenAI's API says it."""
    return JSONResponse({"error": {"message": message, "type": "error", "code": status}}, status, headers)
