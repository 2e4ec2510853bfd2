"""Amounts of resources, exact.

The rule kept here: no amount is ever rounded. A float is taken as the decimal that it prints as, so that three tasks of
0.1, 0.2 and 0.3 leave exactly as much as they found; what is whole stays an `int`, which is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from math import isfinite
from numbers import Rational, Real
from typing import Any, TypeAlias

from .errors import UnknownResourceError, UnschedulableTaskError

__all__ = ["Amount", "Needs", "as_capacity", "as_needs", "check_needs", "exact", "plain", "read_needs", "words"]

Amount: TypeAlias = int | Fraction
_LARGEST = int(sys.float_info.max)
Needs: TypeAlias = tuple[tuple[str, Amount], ...]
"""What one piece of work needs, by label, without what it needs nothing of."""


def exact(value: Any, what: str) -> Amount:
    """A number of any kind as an exact amount; `ValueError` when it is no number, not finite, or negative."""
    if type(value) is int:
        amount: Amount = value
    else:
        if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
            raise ValueError(f"{what} is an amount, a number of 0 or more, and not {value!r}")
        _check_size(value, what)
        amount = _convert(value)
    if amount < 0:
        raise ValueError(f"{what} is an amount and cannot be negative, but is {value!r}")
    if amount > _LARGEST:
        raise _out_of_range(what)
    return amount


def _check_size(value: Any, what: str) -> None:
    """Before it is made exact, which takes a digit for each of its exponent."""
    if isinstance(value, Decimal) and value.is_snan():
        raise ValueError(f"{what} is an amount and must be finite, not {value!r}")
    try:
        near = float(value)
    except OverflowError:
        raise _out_of_range(what) from None
    if not isfinite(near):
        if isinstance(value, Decimal) and value.is_finite():
            raise _out_of_range(what)
        raise ValueError(f"{what} is an amount and must be finite, not {value!r}")
    if not near and value:
        raise _out_of_range(what)


def _out_of_range(what: str) -> ValueError:
    return ValueError(f"{what} is an amount and must be 0, or between 5e-324 and 1.8e+308, so that it can be shown")


def _convert(value: Any) -> Amount:
    if isinstance(value, Rational):  # integers of numpy are, too, and would wrap round
        fraction = Fraction(int(value.numerator), int(value.denominator))
        return fraction.numerator if fraction.denominator == 1 else fraction
    return _from_decimal(value)


@lru_cache(maxsize=1024, typed=True)
def _from_decimal(value: Any) -> Amount:
    if isinstance(value, Decimal):
        fraction = Fraction(value)
    elif isinstance(value, float):
        fraction = Fraction(Decimal(float.__repr__(value)))
    else:
        fraction = Fraction(Decimal(str(value)))  # of other libraries: their text is their precision, float32 for one
    return fraction.numerator if fraction.denominator == 1 else fraction


def as_capacity(resources: Mapping[str, Any] | None) -> dict[str, Amount]:
    """The capacities of a scheduler, checked."""
    if resources is None:
        return {}
    if not isinstance(resources, Mapping):
        raise TypeError(f"resources is a mapping such as {{'cpu': 8}}, not {resources!r}")
    return {_label(label): exact(amount, f"the capacity of {label!r}") for label, amount in resources.items()}


def as_needs(resources: Mapping[str, Any]) -> Needs:
    """What somebody asks for, checked but for the labels, which are a scheduler's."""
    if not isinstance(resources, Mapping):
        raise TypeError(f"resources is a mapping such as {{'cpu': 1}}, not {resources!r}")
    return tuple([(_label(label), exact(amount, f"the need of {label!r}")) for label, amount in resources.items()])


def _label(label: Any) -> str:
    if not isinstance(label, str):
        raise TypeError(f"a resource is called by a text such as 'cpu', not {label!r}")
    return label


def check_needs(needs: Needs, capacity: Mapping[str, Amount], who: str) -> Needs:
    """Refuse what a scheduler does not know or can never give. Returns the needs without those of nothing."""
    nothing = False
    for label, amount in needs:
        known = capacity.get(label)
        if known is None:
            has = ", ".join(map(repr, capacity)) or "none at all"
            raise UnknownResourceError(f"{who} needs {label!r}, which the scheduler does not have; it has {has}")
        if amount > known:
            raise UnschedulableTaskError(
                f"{who} needs {words(amount)} {label}, and the scheduler has {words(known)} in all; "
                "ask for less, or give the scheduler more"
            )
        nothing = nothing or not amount
    return tuple([need for need in needs if need[1]]) if nothing else needs


def read_needs(resources: Mapping[str, Any], capacity: Mapping[str, Amount], task: str | None) -> Needs:
    """Both at once, for a task: quick where all is as it should be, and careful where it is not."""
    for label, amount in resources.items():
        if type(amount) is not int or not 0 < amount <= capacity.get(label, 0):
            return check_needs(as_needs(resources), capacity, f"the task {task!r}" if task else "the task")
    return tuple(resources.items())


def plain(amount: Amount) -> int | float:
    """For people and exporters: an int, or the nearest float."""
    return amount if isinstance(amount, int) else amount.numerator if amount.denominator == 1 else float(amount)


def words(amount: Amount) -> str:
    return str(plain(amount))
