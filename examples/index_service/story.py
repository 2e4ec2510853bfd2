"""The story that `15_service.py --demo` plays, over HTTP, as a user would."""

from __future__ import annotations

import io
import json
import os
import signal
import sysconfig
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from .processes import Service

__all__ = ["play"]


async def play(service: Service) -> None:
    """Upload, watch, kill, see it go on; upload, cancel, see why."""
    async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
        archive, count = packed("json", "email", "logging")
        print(f"uploading {count} files")
        job = (await client.post("/uploads?pause=0.15", content=archive)).raise_for_status().json()
        await watch_and_kill(client, job["task"])
        print("in the index:", (await client.get(job["index"])).json(), f"of {count} files\n")

        job = (await client.post("/uploads?pause=1", content=archive)).raise_for_status().json()
        print("uploading them again, and changing our mind")
        async for event, data in events_of(client, job["task"]):
            if event == "item":
                print(data["item"])
                answer = await client.post(f"{job['task']}/cancel", json={"reason": "it was the wrong folder"})
                print("cancel:", answer.json())
            elif event == "cancelled":
                print(f"cancelled: {data['message']}")


async def watch_and_kill(client: httpx.AsyncClient, task: str) -> None:
    """Follow a task to its end, and kill its worker when something was saved."""
    killed, worker = False, ""
    async for event, data in events_of(client, task):
        if event == "progress" and not killed and stage(data, "remember")["succeeded"] >= 2:
            worker = (await client.get(task)).json()["worker"]  # host:pid
            os.kill(int(worker.rpartition(":")[2]), signal.SIGKILL)
            killed = True
            print(f"{stage(data, 'remember')['succeeded']} batches are remembered; their worker is killed with SIGKILL")
        elif event == "item":
            print(data["item"])
        elif event == "warning":
            print("warning:", data["message"].replace(worker, "which we have killed"))
        elif event == "completed":
            print("completed")


async def events_of(client: httpx.AsyncClient, task: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """The server-sent events of a task: each its name and its data."""
    event = ""
    async with client.stream("GET", f"{task}/events") as response:
        async for line in response.aiter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                event = value
            elif field == "data":
                yield event, json.loads(value)["data"]


def stage(snapshot: dict[str, Any], name: str) -> dict[str, Any]:
    """The numbers of one stage."""
    return next(row for row in snapshot["stages"] if row["name"] == name)


def packed(*packages: str) -> tuple[bytes, int]:
    """Some packages of the standard library as an archive, and how many files that are."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for package in packages for path in (library / package).glob("*.py")]
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for path in files:
            tar.add(path, path.relative_to(library))
    return archive.getvalue(), len(files)
