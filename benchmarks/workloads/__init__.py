"""Every workload, one family a file, in the order of the list of bars."""

from __future__ import annotations

from ..model import Workload
from . import chains, concurrent, depth, duties, processes, scheduler, startup, threads

__all__ = ["WORKLOADS"]

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for family in (chains, concurrent, threads, processes, startup, depth, duties, scheduler)
    for workload in family.WORKLOADS
}
