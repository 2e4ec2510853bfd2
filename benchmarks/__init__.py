"""penstock beside its peers and the bare limits, on one machine, in one run. `python -m benchmarks`, or `make bench`."""
