"""Handlers in worker processes: one pipe for each worker and direction, and a few shared words that survive a crash.

- `wire`: what goes over the pipes, and how it is pickled
- `handlers`: how a handler gets there
- `shared`: the shared words, the ends of the pipes
- `child`: the worker process
- `parent`: the pool, on the run's loop
"""
