import asyncio

from pipeline import Pipeline
from stages import map

squares = Pipeline(range(10)) >> map(lambda n: n * n)
print(asyncio.run(squares.collect()))
