"""From synchronous code: `iter()` runs the pipeline on a loop of its own, in a thread of its own."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline import ErrorPolicy, Pipeline, PipelineFailed
from stages import stage


def lines_of(path: Path) -> Iterator[str]:
    """A generator that may block: the library drives it from a thread, and closes it there."""
    try:
        with path.open() as file:
            yield from file
    finally:
        print("  the file is closed")


@stage(concurrency=4, ordered=True)
async def parse(line: str) -> tuple[str, int]:
    name, age = line.split(",")
    return name, int(age)


@stage(on_error=ErrorPolicy.RAISE)
def check(person: tuple[str, int]) -> str:
    name, age = person
    if age > 150:
        raise ValueError(f"{name} cannot be {age}")
    return f"{name} is {age}"


def main(path: Path) -> None:
    path.write_text("Ada,36\nAlan,41\nGrace,85\nMethuselah,969\nKurt,71\n")
    people = Pipeline(lambda: lines_of(path)) >> parse >> check

    print("Leaving early stops everything behind the loop:")
    for person in people.iter():
        print(" ", person)
        break

    # That iteration was cancelled, and a cancelled pipeline needs a source to run again.
    people.gen(lambda: lines_of(path))
    print("A failure is raised where the items end:")
    try:
        for person in people.iter():
            print(" ", person)
    except PipelineFailed as failure:
        print(f"  {failure}; the cause is a {type(failure.__cause__).__name__}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder) / "people.csv")
