"""The parts of `15_service.py`: `work` is done by workers, `web` is served, `processes` keeps both running, `story` plays."""
