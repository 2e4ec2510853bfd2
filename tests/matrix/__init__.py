"""The fault matrix: each fault that a streaming system must survive, injected for real, in a program of its own.

`python -m matrix F6` (from the folder `tests`) injects one and tells in a line of JSON what came of it;
`tests/test_fault_matrix.py` runs them all and prints the table. What must hold after every fault, the runner checks: no
task, thread, child process or descriptor is left, no loop's exception handler was called, nothing is on stderr.
"""
