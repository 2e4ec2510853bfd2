"""What is served: uploads, the page that watches and cancels, and what came of it.

    tar cz -C ~/my/project . | curl --data-binary @- http://127.0.0.1:8000/uploads
"""

from __future__ import annotations

import asyncio
import math
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import IO
from uuid import uuid4

from index_source.database import summarize
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.tasks import create_app

from .work import FOLDER, backend, index_of

_MOST = 200 << 20
"""Bytes of an archive, and of what is in it."""


async def upload(request: Request) -> Response:
    """An archive (tar, or tar.gz) becomes a folder, and a task that indexes it."""
    try:
        pause = float(request.query_params.get("pause", 0))
    except ValueError:
        pause = math.nan
    if not 0 <= pause <= 10:
        return JSONResponse({"error": "pause is a number of seconds for each file, from 0 to 10"}, 400)
    id = uuid4().hex[:8]
    folder = FOLDER / "uploads" / id
    with tempfile.TemporaryFile() as archive:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > _MOST:
                return JSONResponse({"error": f"an archive has {_MOST:,} bytes at most"}, 413)
            await asyncio.to_thread(archive.write, chunk)
        try:
            await asyncio.to_thread(unpack, archive, folder)
        except (tarfile.TarError, OSError, ValueError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            return JSONResponse({"error": f"this is no archive that can be unpacked: {error}"}, 400)
    key = await backend.submit({"app": "service", "type": "index", "id": id, "pause": pause})
    path = "/".join(key)
    return JSONResponse({"id": id, "watch": f"/#/{path}", "task": f"/tasks/{path}", "index": f"/uploads/{id}"}, 202)


def unpack(archive: IO[bytes], folder: Path) -> None:
    """Only files and folders, only inside of the folder, and only so much."""
    archive.seek(0)
    with tarfile.open(fileobj=archive) as tar:
        members = [member for member in tar if member.isreg() and member.name.endswith(".py")]
        if sum(member.size for member in members) > _MOST:
            raise ValueError(f"its files have more than {_MOST:,} bytes")
        folder.mkdir(parents=True)
        tar.extractall(folder, members, filter="data")


async def look(request: Request) -> Response:
    """What is in the index of an upload."""
    database = index_of(request.path_params["id"])
    if not database.exists():
        return JSONResponse({"error": "there is no such index yet"}, 404)
    summary = await asyncio.to_thread(summarize, database)
    return JSONResponse({"files": summary.files, "functions": summary.functions, "classes": summary.classes})


app = create_app(
    backend,
    title="Index service",
    routes=[
        Route("/uploads", upload, methods=["POST"]),
        Route("/uploads/{id:str}", look),
    ],
)
