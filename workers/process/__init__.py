"""Handlers in worker processes: one pipe for each worker and direction, and memory that both sides see.

- `parent`: the pool, on the run's loop: who does what
- `staff`: who works: workers come, are replaced, and go
- `link`: one process, the parent's ends of its pipes
- `launch`: how a process is started
- `load`: what one process has to do
- `entry`, `child`: the worker process, its beginning and its work
- `limit`: how much memory it may take
- `voice`, `output`: what it prints and logs, on its side and on the parent's
- `wire`: what goes over the pipes
- `packer`: values in boxes, each pickled for itself
- `arena`: shared memory for large buffers
- `memory`: what the large buffers that come back are copied to
- `shared`: the words that survive a crash, the ends of the pipes
- `handlers`: how a handler gets there
- `faults`: what is said of workers that die
"""
