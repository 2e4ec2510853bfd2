"""A pipeline as a program: Ctrl-C finishes what was taken, a second one stops at once, a third one kills.

    python examples/11_program.py 1000        numbers to test; press Ctrl-C whenever you like, then look at `echo $?`
"""

import sys
from collections.abc import Iterator

from pipeline import Err, Pipeline, run_until_signalled
from stages import filter, stage


def odd_numbers(limit: int) -> Iterator[int]:
    yield from range(1_000_003, 1_000_003 + 2 * limit, 2)


@stage(run_in="process", concurrency=2)
def factorized(n: int) -> tuple[int, int]:
    """The number and its smallest factor, which is itself for a prime."""
    return n, next((f for f in range(3, int(n**0.5) + 1, 2) if n % f == 0), n)


@filter
def is_prime(pair: tuple[int, int]) -> bool:
    n, factor = pair
    return n == factor


def main() -> None:
    limit = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    pipeline = Pipeline(odd_numbers(limit), name="primes") >> factorized >> is_prime
    result = run_until_signalled(pipeline)  # after a signal: its account on stderr, and exit code 130 or 143
    if isinstance(result, Err):
        sys.exit(f"failed: {result}")
    print(f"{result.delivered} primes among {result.pulled} odd numbers")


if __name__ == "__main__":
    main()
