"""Watching a run: logs, and the report in words."""
