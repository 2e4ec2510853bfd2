"""The command: what it says when something is wrong, and its exit codes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import run_program
from serving import CLI

from pipeline.cli import main
from pipeline.tasks import AsyncFireAndTrackBackend, TaskCoordinator
from pipeline.tasks.targets import TargetError, hub_of, load_target, make_target


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def complaint(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(argv)
    return code, capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("penstock 0.")


@pytest.mark.parametrize("argv", [[], ["frobnicate"], ["serve"], ["serve", "a:b", "--port", "70000"], ["serve", "a:b", "--shutdown-timeout", "-1"]])
def test_wrong_usage_is_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "penstock" in capsys.readouterr().err


def test_both_commands_explain_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    for command, option in (("serve", "--shutdown-timeout"), ("worker", "--concurrency")):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        assert option in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("service", "write module:attribute"),
        (":hub", "write module:attribute"),
        ("service:", "write module:attribute"),
        ("folder/service.py:hub", "such as folder.service:hub"),
        ("nowhere:hub", "there is no module 'nowhere'"),
        ("service.inner:hub", "there is no module 'service.inner'"),
        ("..service:hub", "there is no module"),
        ("service:hob", "did you mean hub?"),
        ("service:hub.nothing", "has no attribute 'nothing'"),
        ("broken:hub", "importing 'broken' has raised ZeroDivisionError"),
        ("half:hub", "importing 'half' has raised ModuleNotFoundError: No module named 'missing_dependency'"),
    ],
)
def test_a_target_that_is_of_no_use_is_explained(
    target: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "service.py").write_text("from pipeline.tasks import TaskCoordinator\nhub = TaskCoordinator()\n")
    (here / "broken.py").write_text("1 / 0\n")
    (here / "half.py").write_text("import missing_dependency\n")
    code, err = complaint(["serve", target], capsys)
    assert code == 2
    assert said in err
    assert ("Traceback" in err) == ("has raised" in said)


def test_an_attribute_of_an_attribute_can_be_a_target(here: Path) -> None:
    (here / "package").mkdir()
    (here / "package" / "__init__.py").write_text("")
    (here / "package" / "service.py").write_text("class Service:\n    hub = 'the hub'\n")
    assert load_target("package.service:Service.hub") == "the hub"


async def test_a_function_makes_the_target_and_may_be_async() -> None:
    hub = TaskCoordinator()

    async def later() -> TaskCoordinator:
        return hub

    def done(value: object) -> bool:
        return isinstance(value, TaskCoordinator)

    assert await make_target(lambda: hub, is_done=done) is hub
    assert await make_target(later, is_done=done) is hub
    assert await make_target(hub, is_done=done) is hub


async def test_a_function_that_fails_to_make_the_target_is_named() -> None:
    def fails() -> None:
        raise OSError("no disk")

    with pytest.raises(TargetError, match=r"fails.*OSError: no disk"):
        await make_target(fails, is_done=lambda _: False)


def test_the_hub_of_a_backend_is_found_and_a_class_is_none() -> None:
    backend = AsyncFireAndTrackBackend()
    assert hub_of(backend) is backend.coordinator
    with pytest.raises(TypeError, match=r"pass an object of it, TaskCoordinator"):
        hub_of(TaskCoordinator)
    with pytest.raises(TypeError, match=r"'nothing' knows no tasks; pass a TaskCoordinator, or a backend"):
        hub_of("nothing")


def test_a_missing_extra_is_named_with_what_installs_it(tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text("from pipeline.tasks import TaskCoordinator\nhub = TaskCoordinator()\n")
    source = f"""
        import sys
        sys.modules["{{0}}"] = None
        sys.path.insert(0, {str(tmp_path)!r})
        from pipeline.cli import main
        sys.exit(main(["serve", "service:hub"]))
    """
    for name in ("starlette", "uvicorn"):
        finished = run_program(tmp_path, source.format(name))
        assert (finished.code, finished.out) == (1, "")
        assert "pip install 'penstock[web]'" in finished.err


def test_the_command_runs_as_a_module(tmp_path: Path) -> None:
    finished = run_program(tmp_path, "", "--version", interpreter=CLI)
    assert (finished.code, finished.err) == (0, "")
