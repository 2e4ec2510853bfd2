"""Handlers in worker processes: one pipe for each worker and direction, and a few shared words that survive a crash.

- `wire`: what goes over the pipes, and how it is pickled
- `child`: the worker process
- `parent`: the pool, on the run's loop
"""
