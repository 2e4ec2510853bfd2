"""Why and how things stop: reasons, the triggers that give them, and the fence that acts on them."""

from .fence import Fence, ReasonsProvider, get_current_reasons, pop_reasons, push_reasons
from .reason import CancelReason, CancelType
from .triggers import EventTrigger, SignalTrigger, TimeoutTrigger, Trigger, TriggerHandle

__all__ = [
    "CancelReason",
    "CancelType",
    "EventTrigger",
    "Fence",
    "ReasonsProvider",
    "SignalTrigger",
    "TimeoutTrigger",
    "Trigger",
    "TriggerHandle",
    "get_current_reasons",
    "pop_reasons",
    "push_reasons",
]
