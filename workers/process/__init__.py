"""Handlers in worker processes: one pipe for each worker and direction, and memory that both sides see.

- `parent`: the pool, on the run's loop
- `link`: one process, the parent's ends of its pipes
- `load`: what one process has to do
- `child`: the worker process
- `wire`: what goes over the pipes
- `packer`: values in boxes, each pickled for itself
- `arena`: shared memory for large buffers
- `memory`: what the large buffers that come back are copied to
- `shared`: the words that survive a crash, the ends of the pipes
- `handlers`: how a handler gets there
- `faults`: what is said of workers that die
"""
