"""The benchmarks' arithmetic, their runner, and that penstock's own cells do what they say. Nothing here depends on speed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks import measure, runner
from benchmarks.__main__ import AGAIN, RESULTS
from benchmarks.cell import in_words
from benchmarks.measure import Tally, Timed, WrongResult
from benchmarks.model import BEST_PEER, OURS, UVLOOP, Bar, Form, Measures, Workload
from benchmarks.report import Book, Verdict, bars_table, markdown, peers_table, ratio_text
from benchmarks.runner import Outcome, Selection, cells_of, run_all, run_command, without_paths
from benchmarks.workloads import WORKLOADS


class Still:
    """A cell that is never run."""

    def check(self) -> None:
        raise AssertionError("not here")

    def measure(self) -> Measures:
        raise AssertionError("not here")


def workload(*bars: Bar, participants: str = "bare penstock streamable pypeln", **more: object) -> Workload:
    return Workload(name="w", title="some work", cells={name: Still() for name in participants.split()}, bars=bars, **more)


def outcomes(measure: str = "seconds", **costs: list[float]) -> list[Outcome]:
    return [
        Outcome("w", name, number, {measure: cost})
        for name, found in costs.items()
        for number, cost in enumerate(found)
    ]


def verdict_of(subject: Workload, found: list[Outcome]) -> Verdict:
    (verdict,) = Book([subject], found).verdicts()
    return verdict


# --- ratios and verdicts


def test_speed_is_the_references_cost_divided_by_ours() -> None:
    verdict = verdict_of(workload(Bar(against="bare", required=0.5)), outcomes(penstock=[4.0], bare=[3.0]))
    assert (verdict.value, verdict.met, verdict.reference) == (0.75, True, "bare")


def test_cost_is_ours_divided_by_the_references() -> None:
    subject = workload(Bar(against="bare", required=1.1, form=Form.COST))
    assert verdict_of(subject, outcomes(penstock=[2.0], bare=[1.6])).value == 1.25
    assert not verdict_of(subject, outcomes(penstock=[2.0], bare=[1.6])).met
    assert verdict_of(subject, outcomes(penstock=[2.0], bare=[2.0])).met


def test_a_limit_needs_no_reference() -> None:
    subject = workload(Bar(required=2.0, form=Form.LIMIT, measure="p99_ms", unit="ms"))
    verdict = verdict_of(subject, outcomes("p99_ms", penstock=[1.0, 9.0, 1.9]))
    assert (verdict.value, verdict.met, verdict.reference) == (1.9, True, "")


@pytest.mark.parametrize(
    ("bar", "just", "missed"),
    [
        (Bar(required=2.0), 2.0, 1.99),
        (Bar(required=2.0, form=Form.COST), 2.0, 2.01),
        (Bar(required=2.0, form=Form.LIMIT), 2.0, 2.01),
    ],
)
def test_a_bar_that_is_just_reached_is_met(bar: Bar, just: float, missed: float) -> None:
    assert bar.met(just)
    assert not bar.met(missed)


def test_costs_are_compared_within_a_round_and_the_median_counts() -> None:
    # The machine was four times slower in the second round; the last was disturbed on one side.
    subject = workload(Bar(against="bare", required=1.0))
    assert verdict_of(subject, outcomes(penstock=[1.0, 4.0, 1.0], bare=[2.0, 8.0, 30.0])).value == 2.0


def test_a_round_that_one_side_lacks_is_left_out() -> None:
    subject = workload(Bar(against="bare", required=1.0))
    assert verdict_of(subject, outcomes(penstock=[1.0, 1.0, 1.0], bare=[2.0])).value == 2.0


def test_the_best_peer_is_the_cheapest_library_and_never_the_bare_limit() -> None:
    found = outcomes(bare=[0.1], penstock=[1.0], streamable=[3.0], pypeln=[2.0])
    verdict = verdict_of(workload(Bar(against=BEST_PEER, required=2.0)), found)
    assert (verdict.reference, verdict.value, verdict.met) == ("pypeln", 2.0, True)


def test_the_best_peer_is_chosen_by_the_measure_of_the_bar() -> None:
    found = [
        Outcome("w", OURS, 0, {"seconds": 1.0, "cpu": 1.0}),
        Outcome("w", "streamable", 0, {"seconds": 2.0, "cpu": 5.0}),
        Outcome("w", "pypeln", 0, {"seconds": 3.0, "cpu": 4.0}),
    ]
    verdict = verdict_of(workload(Bar(against=BEST_PEER, required=0.5, form=Form.COST, measure="cpu")), found)
    assert (verdict.reference, verdict.value, verdict.met) == ("pypeln", 0.25, True)


def test_who_is_shown_but_not_counted_is_no_reference() -> None:
    subject = workload(Bar(against=BEST_PEER, required=2.0), uncounted={"pypeln": "another task"})
    found = outcomes(penstock=[1.0], streamable=[3.0], pypeln=[0.5])
    assert verdict_of(subject, found).reference == "streamable"
    assert "(2.00×)" in peers_table(Book([subject], found))
    assert "- pypeln: another task." in markdown(Book([subject], found), {})


def test_a_bar_without_a_figure_is_not_met() -> None:
    subject = workload(Bar(against="bare", required=0.5))
    verdict = verdict_of(subject, outcomes(bare=[1.0]))
    assert (verdict.value, verdict.met, verdict.score) == (None, False, None)
    assert "| some work | bare | no figure | ≥ 0.5× | **no** |" in bars_table([verdict])


def test_a_bar_is_not_met_when_penstock_failed_in_one_round_only() -> None:
    subject = workload(Bar(against="bare", required=0.5))
    verdict = verdict_of(subject, [*outcomes(penstock=[1.0], bare=[1.0]), Outcome("w", OURS, 1, failure="raised ValueError: no")])
    assert (verdict.value, verdict.met) == (1.0, False)
    assert "| 1.00× | ≥ 0.5× | **no**, it failed |" in bars_table([verdict])


def test_a_ratio_seen_from_the_other_side_is_its_inverse() -> None:
    book = Book([subject := workload()], outcomes(penstock=[1.0, 1.0], bare=[2.0, 8.0]))
    assert book.relative(subject, "seconds", OURS, "bare") == pytest.approx(4.0)
    assert book.relative(subject, "seconds", "bare", OURS) == pytest.approx(0.25)


def test_a_bar_whose_peers_all_failed_says_so() -> None:
    found = [*outcomes(penstock=[1.0]), Outcome("w", "pypeln", 0, failure="not installed")]
    verdict = verdict_of(workload(Bar(against=BEST_PEER, required=2.0)), found)
    assert (verdict.reference, verdict.met) == ("no peer finished", False)


def test_the_score_says_how_far_from_the_bar_in_either_direction() -> None:
    assert Verdict("w", "", Bar(required=2.0), "", 3.0).score == 1.5
    assert Verdict("w", "", Bar(required=3.0, form=Form.LIMIT), "", 2.0).score == 1.5


# --- tables


def test_a_peer_that_failed_gets_its_row_with_what_happened() -> None:
    subject = workload(Bar(against="bare", required=0.5))
    found = [*outcomes(penstock=[1.0], bare=[1.0]), Outcome("w", "pypeln", 0, failure="had not finished after 30 s, and was killed")]
    text = markdown(Book([subject], found), {"Python": "3"})
    assert "| some work | 1.00× | – | failed |" in text
    assert "| some work | pypeln | had not finished after 30 s, and was killed |" in text
    assert "1 of 1 met" in text


def test_a_workload_of_penstock_alone_has_a_bar_and_no_row_among_the_peers() -> None:
    subject = workload(Bar(required=2.0, form=Form.LIMIT, measure="ms", unit="ms"))
    book = Book([subject], outcomes("ms", penstock=[1.0]))
    assert "| some work | – | 1.00 ms | ≤ 2 ms | yes |" in bars_table(book.verdicts())
    assert "some work" not in peers_table(book)


def test_a_cell_of_a_table_cannot_break_the_table() -> None:
    found = [*outcomes(penstock=[1.0]), Outcome("w", "pypeln", 0, failure="raised E: a | b")]
    assert "a \\| b" in markdown(Book([workload()], found), {})


@pytest.mark.parametrize(("value", "text"), [(51.2, "51×"), (1.054, "1.05×"), (0.1, "0.10×"), (0.0123, "0.012×"), (0.0001, "<0.001×")])
def test_ratios_have_as_many_digits_as_they_are_worth(value: float, text: str) -> None:
    assert ratio_text(value) == text


def test_uvloop_has_a_table_of_its_own_and_is_nobodys_reference() -> None:
    subject = workload(Bar(against=BEST_PEER, required=1.0))
    found = [*outcomes(penstock=[1.0], pypeln=[2.0]), Outcome("w", UVLOOP, 0, {"seconds": 0.5})]
    assert verdict_of(subject, found).reference == "pypeln"
    assert "| some work | 2.00× |" in markdown(Book([subject], found), {})


# --- what is run


def test_workloads_and_peers_are_chosen_by_parts_of_their_names() -> None:
    chosen = Selection(only="threads-64, canc", peers="stream").workloads(WORKLOADS)
    assert [found.name for found in chosen] == ["threads-64", "cancel"]
    assert cells_of(WORKLOADS["sync3-run"], Selection(peers="streamable")) == ["bare", "penstock", "streamable", "streamable async"]


def test_what_a_bar_refers_to_is_always_run() -> None:
    assert cells_of(WORKLOADS["processes-trivial"], Selection(peers="none of them")) == ["penstock", "Pool.imap"]


def test_rounds_take_turns_and_who_failed_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(command: list[str], timeout: float, environment: object) -> tuple[Measures, str]:
        return ({}, "hung") if command[-1] == "pypeln" else ({"seconds": 1.0}, "")

    monkeypatch.setattr(runner, "run_command", answer)
    found = list(run_all([workload(participants="bare penstock pypeln")], Selection(rounds=3), lambda line: None))
    assert [(outcome.round, outcome.participant) for outcome in found] == [
        *[(0, "bare"), (0, "penstock"), (0, "pypeln")],
        *[(1, "penstock"), (1, "bare")],
        *[(2, "bare"), (2, "penstock")],
    ]


def test_a_workload_may_have_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_command", lambda *_: ({"seconds": 1.0}, ""))
    assert len(list(run_all([workload(participants="bare", rounds=1)], Selection(rounds=3), lambda line: None))) == 1


# --- one process


def test_a_cell_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LINGER", 0.0)
    note = tmp_path / "child"
    script = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)"
    )
    assert run_command([sys.executable, "-c", script], 1.0) == ({}, "had not finished after 1 s, and was killed")
    assert _ends(int(note.read_text()))


def test_a_process_that_a_cell_leaves_behind_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LINGER", 0.0)
    note = tmp_path / "child"
    script = (
        "import subprocess, sys, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid))\n"
        'print(\'{"measures": {"seconds": 1.0}}\')'
    )
    assert run_command([sys.executable, "-c", script], 20.0) == ({"seconds": 1.0}, "")
    assert _ends(int(note.read_text()))


def _ends(pid: int) -> bool:
    """Whether a killed process is gone, or a zombie that init has not collected yet."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return False


def test_a_crash_is_told_in_words_without_the_folders_of_this_machine() -> None:
    measures, failure = run_command([sys.executable, "-c", "open('/no/such/place/file.txt')"], 20.0)
    assert measures == {}
    assert failure == "ended with exit status 1: FileNotFoundError: [Errno 2] No such file or directory: '…/file.txt'"


def test_a_cell_that_is_killed_is_told_by_the_signal() -> None:
    _, failure = run_command([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], 20.0)
    assert failure == "killed by signal 9"


def test_a_cell_that_does_not_exist_is_a_failure_like_any_other() -> None:
    _, failure = run_command([sys.executable, "-m", "benchmarks.cell", "no such workload", OURS], 20.0)
    assert failure == "raised KeyError: 'no such workload'"


def test_a_library_that_is_not_installed_is_said_to_be_missing() -> None:
    assert in_words(ModuleNotFoundError("No module named 'peer'", name="peer")) == "not installed: there is no module 'peer'"
    assert in_words(ValueError()) == "raised ValueError"


def test_long_words_are_cut() -> None:
    assert len(without_paths("x" * 1000)) == 200


# --- timing


def test_what_every_run_costs_once_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(once=5.0, item=0.25)
    monkeypatch.setattr(measure, "perf_counter", clock)
    monkeypatch.setattr(measure, "process_time", clock)
    found = Timed(run=clock.run, expected=Tally, base=4, seconds=10.0).measure()
    assert (found["seconds"], found["cpu"], found["fixed"]) == (0.25, 0.25, 6.0)
    assert found["items"] == 4 + 40


class _Clock:
    """Time that passes only in runs: so much a run, and so much an item."""

    def __init__(self, once: float, item: float) -> None:
        self._now = 0.0
        self._once = once
        self._item = item

    def __call__(self) -> float:
        return self._now

    def run(self, n: int) -> Tally:
        self._now += self._once + self._item * n
        return Tally(n)


def test_workers_that_start_late_are_compared_with_a_quarter_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(once=5.0, item=0.25)
    monkeypatch.setattr(measure, "perf_counter", clock)
    monkeypatch.setattr(measure, "process_time", clock)
    sizes: list[int] = []

    def run(n: int) -> Tally:
        sizes.append(n)
        return clock.run(n)

    found = Timed(run=run, expected=Tally, base=4, seconds=10.0, repeats=1, step=4, steady=True).measure()
    assert sizes[-2:] == [44, 12]
    assert found["seconds"] == 0.25


def test_a_time_that_cannot_be_told_from_chance_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 0.0, 0.0, 0.0, 0.0, 99.0])  # two small runs, and one that something has disturbed
    monkeypatch.setattr(measure, "perf_counter", lambda: next(ticks, 0.0))
    with pytest.raises(RuntimeError, match="could not be told from the time of a start"):
        Timed(run=Tally, expected=Tally, repeats=1).measure()


def test_wrong_outputs_are_a_failure_before_any_time_counts() -> None:
    with pytest.raises(WrongResult, match="its outputs are wrong: count 31, not 32"):
        Timed(run=lambda n: Tally(n - 1), expected=Tally).measure()


def test_what_was_not_looked_at_is_not_compared() -> None:
    Tally(last=3).verify(Tally(1, 2, 3))
    with pytest.raises(WrongResult, match="total 5, not 2"):
        Tally(total=5).verify(Tally(1, 2, 3))


# --- penstock's own cells


@pytest.mark.parametrize("name", WORKLOADS)
def test_penstocks_outputs_are_right_in(name: str) -> None:
    WORKLOADS[name].cells[OURS].check()


@pytest.mark.parametrize("name", [name for name, found in WORKLOADS.items() if "bare" in found.cells])
def test_the_bare_limit_does_the_same_work_in(name: str) -> None:
    WORKLOADS[name].cells["bare"].check()


def test_every_bar_refers_to_somebody_in_its_workload() -> None:
    for found in WORKLOADS.values():
        for bar in found.bars:
            assert bar.against in ("", BEST_PEER, *found.cells), found.name


# --- what is committed


def test_the_committed_results_name_no_machine() -> None:
    saved = (RESULTS / "results.json").read_text()
    assert not [word for word in ("/home", "/root", "/tmp", "/work", "/usr") if word in saved]
    assert json.loads(saved)["run"].keys() - {AGAIN} == {"Python", "system", "cores", "rounds"}
