"""One participant in one workload, in a fresh process: `python -m benchmarks.cell WORKLOAD PARTICIPANT`.

The rule kept here: one line of JSON on standard output, `{"measures": …}` or `{"failure": "in words"}`, and nothing
else. Whatever a library prints goes to standard error.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
import warnings

from .model import OURS, UVLOOP, Measures


def main(workload: str, participant: str) -> None:
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        text = json.dumps({"measures": _measured(workload, participant)})
    except BaseException as error:
        traceback.print_exc()
        text = json.dumps({"failure": in_words(error)})
    os.write(answer, text.encode() + b"\n")
    # Not the interpreter's own end: it would wait for threads that some libraries leave behind.
    sys.stderr.flush()
    os._exit(0)


def _measured(workload: str, participant: str) -> Measures:
    from .workloads import WORKLOADS

    if participant == UVLOOP:
        import uvloop

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        participant = OURS
    return WORKLOADS[workload].cells[participant].measure()


def in_words(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: there is no module {error.name!r}"
    first = str(error).strip().splitlines()[:1]
    return f"raised {type(error).__name__}: {first[0]}" if first else f"raised {type(error).__name__}"


if __name__ == "__main__":
    main(*sys.argv[1:])
