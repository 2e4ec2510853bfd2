"""Why and how things stop: reasons, the triggers that give them, and the fence that acts on them."""

from .current import get_current_reasons
from .ending import EndTrigger
from .fence import Fence
from .memory import MemoryTrigger
from .reason import CancelReason, CancelType
from .signals import SignalTrigger
from .triggers import DeadlineTrigger, EventTrigger, TimeoutTrigger, Trigger, TriggerHandle

__all__ = [
    "CancelReason",
    "CancelType",
    "DeadlineTrigger",
    "EndTrigger",
    "EventTrigger",
    "Fence",
    "MemoryTrigger",
    "SignalTrigger",
    "TimeoutTrigger",
    "Trigger",
    "TriggerHandle",
    "get_current_reasons",
]
