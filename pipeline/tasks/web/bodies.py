"""What a client sends: the reason for a cancellation, as JSON or as a form.

The rule kept here: nothing of unknown size or duration is waited for.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import ClientDisconnect, Request

from .guard import Refusal

__all__ = ["MAX_REASON", "read_reason"]

MAX_REASON = 1_000
"""Characters of a reason."""
_MAX_BODY = 16_384
"""Bytes of a request."""
_TIMEOUT = 10.0
"""Seconds for a request to arrive."""


async def read_reason(request: Request) -> str:
    """The text of `reason` in the body; empty for none. Raises `Refusal` for what cannot be read as that."""
    body = await _body(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not body:
        return ""
    if kind == "application/json":
        return _checked(_from_json(body))
    if kind == "application/x-www-form-urlencoded":
        return _checked(_from_form(body))
    raise Refusal(415, 'send {"reason": "…"} as application/json, or a form')


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(_TIMEOUT):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _MAX_BODY:
                    raise Refusal(413, f"a request may have {_MAX_BODY:,} bytes; send only a reason", {"Connection": "close"})
    except TimeoutError:
        raise Refusal(408, f"the request did not arrive within {_TIMEOUT:g} s", {"Connection": "close"}) from None
    except ClientDisconnect:
        raise Refusal(400, "the client has left") from None
    return bytes(body)


def _from_json(body: bytes) -> Any:
    try:
        told: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, 'the request is no JSON; send {"reason": "…"}') from None
    if not isinstance(told, dict):
        raise Refusal(400, 'send an object, such as {"reason": "…"}')
    return told.get("reason")


def _from_form(body: bytes) -> str:
    try:
        return parse_qs(body.decode(), max_num_fields=10).get("reason", [""])[0]
    except ValueError:
        raise Refusal(400, "the form cannot be read; send reason=… in UTF-8") from None


def _checked(reason: Any) -> str:
    if reason is None:
        return ""
    if not isinstance(reason, str):
        raise Refusal(400, "a reason is a text")
    if len(reason) > MAX_REASON:
        raise Refusal(400, f"a reason may have {MAX_REASON:,} characters, not {len(reason):,}")
    shown = "".join(character if character.isprintable() or character == "\n" else " " for character in reason)
    return shown.encode("utf-8", "replace").decode().strip()
