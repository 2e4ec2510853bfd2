"""The processes of the service: one that serves, and some that work. In production a service manager does this."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import IO

__all__ = ["Service"]

EXAMPLES = Path(__file__).resolve().parent.parent


class Service:
    """For `async with`. A worker that ends is followed by another; leaving stops all in good order."""

    def __init__(self, folder: Path, *, workers: int, port: int) -> None:
        self.folder = folder
        self.url = ""
        self.workers: dict[int, asyncio.subprocess.Process] = {}
        self._count = workers
        self._port = port
        self._web: asyncio.subprocess.Process | None = None
        self._keepers: list[asyncio.Task[None]] = []
        self._log: IO[bytes] | None = None

    async def __aenter__(self) -> Service:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = open(self.folder / "log", "ab")  # noqa: ASYNC230, SIM115
        try:
            self._web = await self._start("serve", "index_service.web:app", "--port", str(self._port), out=asyncio.subprocess.PIPE)
            assert self._web.stdout is not None
            said = (await self._web.stdout.readline()).decode()
            if not said:
                raise RuntimeError(f"the service does not start; see {self.folder / 'log'}")
            self.url = said.split()[-1].rstrip("/")
            for _ in range(self._count):
                self._keepers.append(asyncio.create_task(self._keep(await self._begin())))
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        if self._web is not None:
            await _stop(self._web)
        if self._log is not None:
            self._log.close()

    async def _begin(self) -> asyncio.subprocess.Process:
        worker = await self._start("worker", "index_service.work:backend", "--grace", "1")
        self.workers[worker.pid] = worker
        return worker

    async def _keep(self, worker: asyncio.subprocess.Process) -> None:
        """One worker after the other."""
        while True:
            try:
                await worker.wait()
            finally:
                del self.workers[worker.pid]
                await _stop(worker)
            await asyncio.sleep(0.5)
            worker = await self._begin()

    async def _start(self, *command: str, out: int | None = None) -> asyncio.subprocess.Process:
        paths = [str(EXAMPLES), str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pipeline.cli", *command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out if out is not None else self._log,
            stderr=self._log,
            env={**os.environ, "INDEX_SERVICE": str(self.folder), "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for the program that started them
        )


async def _stop(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    await process.wait()
