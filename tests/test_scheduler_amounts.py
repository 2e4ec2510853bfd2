"""Amounts of resources: what is taken for one, what is refused, and that nothing is ever rounded.

The rule kept here: whatever kind of number it was, inside the scheduler it is an int or a fraction of ints.
"""

from __future__ import annotations

import decimal
import json
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
import pytest
from helpers import LIMIT
from hypothesis import given, settings
from hypothesis import strategies as st
from staging import Work, nothing, run_body, submit

from pipeline.scheduler import Scheduler, StagedPipeline
from pipeline.scheduler.amounts import as_capacity, as_needs, check_needs, exact, plain, words
from pipeline.scheduler.claim import Claim, Group
from pipeline.scheduler.engine import Engine

decimals = st.decimals(min_value=0, max_value=10**6, allow_nan=False, allow_infinity=False, places=6)


@given(st.lists(decimals, min_size=1, max_size=20))
def test_decimals_given_as_floats_are_those_decimals(amounts: list[Decimal]) -> None:
    total: Any = 0
    for amount in amounts:
        total += exact(float(amount), "it")
    assert total == sum(map(Fraction, amounts))
    for amount in amounts:
        total -= exact(float(amount), "it")
    assert total == 0


def test_a_whole_amount_is_an_int_however_it_is_written() -> None:
    for value in (2, 2.0, Decimal(2), Decimal("2.00"), Fraction(4, 2)):
        assert type(exact(value, "it")) is int


def test_numbers_of_other_libraries_are_the_decimals_that_they_print_as() -> None:
    assert exact(numpy.float32(0.1), "it") == Fraction(1, 10)
    assert exact(numpy.float64(0.3), "it") == Fraction(3, 10)
    assert exact(numpy.int64(7), "it") == 7


def test_amounts_are_shown_as_they_were_given() -> None:
    assert [plain(exact(value, "it")) for value in (0.1, 3, 2.5, Fraction(1, 4))] == [0.1, 3, 2.5, 0.25]


INTEGERS = (numpy.int8, numpy.uint8, numpy.int16, numpy.uint32, numpy.int64, numpy.uint64)


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_numpy_are_ints_and_never_wrap_round(kind: Any) -> None:
    assert type(exact(kind(100), "it")) is int

    def body(pipeline: StagedPipeline) -> Any:
        pipeline.wait([pipeline.task(nothing, resources={"cpu": kind(100)}).run() for _ in range(5)])
        snapshot = pipeline.task(scheduler.snapshot, resources={"cpu": kind(100)}).run().result()
        return json.loads(json.dumps(snapshot.to_dict()))

    with Scheduler(resources={"cpu": 1000, "gpu": kind(3)}, task_parallelism=5) as scheduler:
        shown = submit(scheduler, body).result(LIMIT)
    assert [row["in_use"] for row in shown["resources"]] == [100, 0]


def test_a_fraction_of_numpy_integers_is_one_of_ints() -> None:
    amount = exact(Fraction(numpy.int8(1), numpy.int8(3)), "it")
    assert isinstance(amount, Fraction)
    assert (type(amount.numerator), type(amount.denominator)) == (int, int)


class Named(float):
    """A number with a text of its own."""

    def __str__(self) -> str:
        return "a third"

    __repr__ = __str__


def test_a_float_that_prints_as_something_else_is_the_decimal_that_it_is() -> None:
    assert exact(Named(0.3), "it") == Fraction(3, 10)


NOT_FINITE = [Decimal("sNaN"), Decimal("-Infinity"), numpy.float32("nan"), float("inf"), numpy.longdouble("inf")]


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
def test_what_is_not_finite_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        exact(value, "it")


@pytest.mark.parametrize(
    "value",
    [10**5000, Decimal("1E+999999999"), Fraction(10**400, 3), Decimal("1E-999999999"), Fraction(1, 10**400)],
    ids=["int", "large decimal", "large fraction", "small decimal", "small fraction"],
)
def test_what_no_float_comes_near_to_is_refused_at_once(value: Any) -> None:
    with pytest.raises(ValueError, match=r"between 5e-324 and 1\.8e\+308"):
        exact(value, "it")


@pytest.mark.parametrize(
    "value", [5e-324, 1e-30, 1e30, 1.7e308, Decimal("1E+300"), Decimal("0E-999999999"), Fraction(10**300, 3)], ids=str
)
def test_what_is_taken_can_be_shown(value: Any) -> None:
    amount = exact(value, "it")
    assert float(plain(amount)) == float(value)
    assert words(amount) == str(plain(amount))


def test_the_precision_of_decimal_contexts_does_not_matter() -> None:
    with decimal.localcontext(prec=2, traps=[decimal.FloatOperation, decimal.Inexact, decimal.Rounded]):
        assert exact(Decimal("1.23456789"), "it") == exact(1.23456789, "it") == Fraction(123456789, 10**8)


amounts = st.one_of(
    st.integers(0, 1000),
    st.floats(0, 1000, allow_subnormal=False).filter(lambda value: not 0 < value < 1e-300),
    st.decimals(0, 1000, allow_nan=False, places=9),
    st.fractions(0, 1000, max_denominator=10**9),
    st.floats(0, 1000, width=32, allow_subnormal=False).map(numpy.float32),
    st.integers(0, 127).map(numpy.int8),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(amounts, min_size=1, max_size=50), st.randoms(use_true_random=False))
def test_whatever_was_taken_and_given_back_in_any_order_leaves_exactly_what_was_there(given_amounts: list[Any], order: Any) -> None:
    capacity = as_capacity({"cpu": 10**6 + Fraction(1, 7)})
    engine, group = Engine(capacity, threads=1), Group(1, "g")

    def claim(number: int, amount: Any) -> Claim:
        return Work(group, check_needs(as_needs({"cpu": amount}), capacity, "it"), (0, 0, 1, number))

    claims = [claim(number, amount) for number, amount in enumerate(given_amounts)]
    assert all(engine.submit(each) for each in claims)
    everything = claim(len(claims), capacity["cpu"])
    waits = not engine.submit(everything)
    assert waits is any(each.needs for each in claims)
    order.shuffle(claims)
    admitted = [engine.drop(each) and engine.admit() for each in claims]
    assert engine.free["cpu"] == 0
    assert admitted.count([everything]) == waits


def test_after_thousands_of_small_tasks_there_is_room_for_one_that_needs_everything() -> None:
    pieces = (0.1, Decimal("0.2"), 0.3, Fraction(1, 3), numpy.float32(0.7), 1e-30, numpy.int8(1))

    def body(pipeline: StagedPipeline) -> Any:
        pipeline.wait([pipeline.task(nothing, resources={"cpu": pieces[n % len(pieces)]}).run() for n in range(3000)])
        return pipeline.task(lambda: "full", resources={"cpu": 4}).run().result(LIMIT)

    assert run_body(body, task_parallelism=4) == "full"
