"""What the responses are made of: JSON, the files of the page, and headers that keep browsers strict.

The rule kept here: nothing that a task says is ever markup. Data leaves as JSON, under a content type that no browser
takes for anything else; the page puts it into text nodes, and runs no script but its own file.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

__all__ = ["SAFETY", "PageFiles", "answer", "refuse", "tagged"]

SAFETY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with "no-referrer", browsers tell "null" for the origin of a form
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_PAGE = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}

_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "graph.js": "text/javascript; charset=utf-8",
    "list.js": "text/javascript; charset=utf-8",
    "events.js": "text/javascript; charset=utf-8",
    "text.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


def answer(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON. Half characters, which UTF-8 cannot hold, are told as "?"."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), status, {**SAFETY, **(headers or {})}, "application/json")


def refuse(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """What is wrong with a request, as JSON."""
    return answer({"error": message}, status, headers)


def tagged(request: Request, response: Response) -> Response:
    """The response; or 304, if the client says that it has exactly this one already."""
    tag = f'"{hashlib.blake2b(bytes(response.body), digest_size=12).hexdigest()}"'
    response.headers["ETag"] = tag
    given = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
    if tag not in given:
        return response
    kept = {name: value for name, value in response.headers.items() if name not in ("content-length", "content-type")}
    return Response(status_code=304, headers=kept)


class PageFiles:
    """The files of the page, read once. Their names are all there is to ask for, so no path leads anywhere else."""

    def __init__(self, title: str) -> None:
        folder = files("pipeline.tasks.web") / "static"
        self._files = {name: (folder / name).read_bytes() for name in _TYPES}
        shown = html.escape(title).encode("utf-8", "replace")
        self._files["index.html"] = self._files["index.html"].replace(b"{{title}}", shown)

    async def index(self, request: Request) -> Response:
        return self._answer("index.html", request)

    async def file(self, request: Request) -> Response:
        name: Any = request.path_params["file"]
        return self._answer(name, request) if name in _TYPES and name != "index.html" else refuse(404, "there is no such file")

    def _answer(self, name: str, request: Request) -> Response:
        return tagged(request, Response(self._files[name], headers={**SAFETY, **_PAGE}, media_type=_TYPES[name]))
