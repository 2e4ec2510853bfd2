"""The types of chains, as pyright sees them: a right chain has the right type, a wrong one is an error.

One run of pyright over all programs at once: starting it costs seconds. In a program, `expect: <words>` in a comment
says that this line, and no other, is an error that contains these words.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

CASES = Path(__file__).resolve().parent / "typing_cases"
ROOT = CASES.parent.parent
PROGRAMS = sorted(path.name for path in CASES.glob("*.py"))
PYRIGHT = Path(sys.executable).parent / "pyright"

_EXPECT = re.compile(r"# expect: (.*)$")
_Errors = dict[str, dict[int, str]]

pytestmark = pytest.mark.skipif(not PYRIGHT.exists(), reason="pyright is not installed here; the main environment runs this")


@pytest.fixture(scope="module")
def errors() -> _Errors:
    """What pyright complains about: by program, then by line."""
    command = [PYRIGHT, "--outputjson", "--pythonpath", sys.executable, *(CASES / program for program in PROGRAMS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=220)
    found: _Errors = defaultdict(dict)
    answer = json.loads(done.stdout)
    assert answer["summary"]["filesAnalyzed"] >= len(PROGRAMS), done.stdout
    for one in answer["generalDiagnostics"]:
        if one["severity"] == "error":
            lines = found[Path(one["file"]).name]
            number = one["range"]["start"]["line"] + 1
            lines[number] = lines.get(number, "") + one["message"] + "\n"
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_error_is_expected_and_every_expected_error_is_there(program: str, errors: _Errors) -> None:
    expected = {
        number: match.group(1)
        for number, line in enumerate((CASES / program).read_text().splitlines(), 1)
        if (match := _EXPECT.search(line))
    }
    actual = errors.get(program, {})
    assert {number: actual[number] for number in actual.keys() - expected.keys()} == {}
    for number, words in expected.items():
        assert all(word in actual.get(number, "(no error)") for word in words.split()), f"{program}:{number}"


def test_the_programs_can_be_imported() -> None:
    """A case that raises when it is declared would prove nothing."""
    code = "import runpy, sys; [runpy.run_path(path) for path in sys.argv[1:]]"
    paths = [str(CASES / program) for program in PROGRAMS if not program.startswith("wrong")]
    done = subprocess.run([sys.executable, "-c", code, *paths], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
