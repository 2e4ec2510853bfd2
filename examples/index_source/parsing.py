"""Source files: found, read, and taken apart."""

from __future__ import annotations

import ast
import gc
import os
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Definition", "Module", "SourceFile", "find_files", "parse_file", "prepare_parser", "printable", "read_file"]

_NOT_OURS = {"site-packages", "dist-packages", "node_modules", "__pycache__"}
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
"""The fields of a statement that hold further statements."""


class SourceFile(NamedTuple):
    """A file that could be read."""

    path: str
    text: str


class Definition(NamedTuple):
    """A function or a class."""

    kind: str
    name: str
    line: int
    documented: bool


class Module(NamedTuple):
    """What the index keeps of a file that could be parsed. `imports` are module names, each once."""

    path: str
    lines: int
    documented: bool
    definitions: list[Definition]
    imports: list[str]


def find_files(root: Path) -> Iterator[Path]:
    """The Python files under `root`, without installed packages and hidden directories; or `root` itself, if a file."""
    if root.is_file():
        yield root
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _NOT_OURS and not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def read_file(path: Path) -> SourceFile:
    """The text, decoded as the file itself declares; raises SyntaxError or UnicodeDecodeError if that cannot be right."""
    with tokenize.open(path) as file:
        return SourceFile(printable(path), file.read())


def printable(path: Path) -> str:
    """A path that can be printed and stored, even if the file's name is no valid text."""
    return os.fsencode(path).decode(errors="backslashreplace")


def prepare_parser(_state: object) -> None:
    """Once in every worker process."""
    warnings.simplefilter("ignore")  # old code is full of invalid escapes; that is not what we are looking for
    gc.disable()  # syntax trees hold no cycles, and looking for some takes a fifth of the time


def parse_file(source: SourceFile) -> Module:
    """Definitions and imports. Besides SyntaxError, absurd nesting raises RecursionError or MemoryError."""
    tree = ast.parse(source.text, source.path)
    definitions: list[Definition] = []
    imports: set[str] = set()
    for node in _statements(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            definitions.append(Definition("function", node.name, node.lineno, _documented(node)))
        elif isinstance(node, ast.ClassDef):
            definitions.append(Definition("class", node.name, node.lineno, _documented(node)))
        elif isinstance(node, ast.Import):
            imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imports.add(node.module)
    return Module(source.path, source.text.count("\n") + 1, _documented(tree), definitions, sorted(imports))


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Every statement. Not `ast.walk`, which visits every expression too: that is most of a tree."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield node
        for block in _BLOCKS:
            pending.extend(getattr(node, block, ()))


def _documented(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return ast.get_docstring(node, clean=False) is not None
