"""Computing in processes: state per worker, closures, and a worker that is killed.

Worker processes import this program again, so what starts a pipeline is under `if __name__ == "__main__":`.
"""

import asyncio
import os
import signal

from pipeline import Err, ErrorPolicy, Pipeline, is_err
from stages import map, stage
from workers import WorkerState


def prepare(state: WorkerState) -> None:
    """Once in every worker: a place for what is expensive to make."""
    state.update(primes=[2], seen=0)


@stage(run_in="process", concurrency=2, ordered=True, setup=prepare)
def nth_prime(n: int, state: WorkerState) -> tuple[int, int, int]:
    """The nth prime number. The list of primes stays in the worker from item to item."""
    primes: list[int] = state.values["primes"]
    candidate = primes[-1]
    while len(primes) < n:
        candidate += 1
        if all(candidate % prime for prime in primes):
            primes.append(candidate)
    state.values["seen"] += 1
    return n, primes[n - 1], os.getpid()


@stage(run_in="process", concurrency=2, on_error=ErrorPolicy.EMIT)
def crash_on_seven(n: int) -> int:
    if n == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


async def main() -> None:
    answers = await (Pipeline(range(100, 2001, 100)) >> nth_prime).collect()
    assert not is_err(answers)
    n, prime, _ = answers[-1]
    workers = {worker for _, _, worker in answers}
    print(f"prime number {n:,} is {prime:,}; {len(workers - {os.getpid()})} worker processes found {len(answers)} of them")

    factor = 3
    tripled = Pipeline(range(5)) >> map(lambda n: n * factor, run_in="process")
    print("a lambda, with the variable that it uses:", await tripled.collect())

    numbers = await (Pipeline(range(20)) >> crash_on_seven).collect()
    assert not is_err(numbers)
    lost = [number for number in numbers if isinstance(number, Err)]
    print(f"{len(numbers) - len(lost)} of 20 items survived a killed worker; the one that it was at:")
    print(f"  {lost[0].item}: {lost[0].value}")


if __name__ == "__main__":
    asyncio.run(main())
