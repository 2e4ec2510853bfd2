"""What a pipeline can be told when it is declared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .cancellation.triggers import Trigger
from .errors import StageConfigError
from .lifecycle import Grace
from .policy import ErrorPolicy

if TYPE_CHECKING:
    from .scheduler import Scheduler

__all__ = ["PipelineOptions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineOptions:
    """The options of `Pipeline`, where they are explained; checked on creation: StageConfigError and TypeError."""

    name: str = "pipeline"
    on_error: ErrorPolicy = ErrorPolicy.DROP
    cancel_on: Sequence[Trigger] = ()
    grace: Grace = field(default_factory=Grace)
    scheduler: Scheduler | None = None
    log: bool = False
    tally_len: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise StageConfigError(f"name must be a text, not {self.name!r}")
        if not isinstance(self.on_error, ErrorPolicy):
            raise StageConfigError(f"on_error must be an ErrorPolicy (DROP, EMIT, RAISE or SIDE), not {self.on_error!r}")
        if not isinstance(self.grace, Grace):
            raise StageConfigError(f"grace must be a Grace(drain=..., abort=..., terminate=..., kill=...), not {self.grace!r}")
        if self.scheduler is not None:
            _check_scheduler(self.scheduler)
        for trigger in self.cancel_on:
            if isinstance(trigger, type) or not isinstance(trigger, Trigger):
                raise TypeError(f"cancel_on takes triggers, such as TimeoutTrigger(30), not {trigger!r}")


def _check_scheduler(scheduler: object) -> None:
    from .scheduler import Scheduler  # who has one has imported it, and nobody else pays for it

    if not isinstance(scheduler, Scheduler):
        raise StageConfigError(f"scheduler must be a Scheduler(resources=...), not {scheduler!r}")
