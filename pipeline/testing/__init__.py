"""For test suites: nothing left behind."""

from .leaks import LeakCheck, assert_no_leaks

__all__ = ["LeakCheck", "assert_no_leaks"]
