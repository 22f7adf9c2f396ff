"""The program's files, and the constants in them, wherever they are: for tests, and for processes under test."""

from __future__ import annotations

import ast
import functools
import importlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ELF = ROOT / "elf.py"
PACKAGE = ROOT / "iot_elf"  # what elf.py is built on
TESTS = ROOT / "tests"

Limits = Callable[..., None]  # limits(CONNECT_TIMEOUT_S=0.5): other constants of the program, until the test ends

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # as Python does for who runs elf.py: `import elf` finds it


def program_files() -> list[Path]:
    """elf.py, and each module of what it is built on."""
    return [ELF, *sorted(PACKAGE.glob("*.py"))]


def program_text(*names: str) -> str:
    """The text of all of it, or of the modules of these names."""
    return "\n".join(path.read_text(encoding="utf-8") for path in program_files() if not names or path.stem in names)


def copy_program(directory: Path) -> Path:
    """Copy what `elf.py` needs on AWS to a directory; return the path of the copied elf.py."""
    directory.mkdir(parents=True, exist_ok=True)
    if PACKAGE.is_dir():
        shutil.copytree(PACKAGE, directory / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return Path(shutil.copy(ELF, directory))


def name_of(path: Path) -> str:
    """The name by which one of the program's files is imported."""
    relative = path.relative_to(ROOT).with_suffix("")
    return ".".join(part for part in relative.parts if part != "__init__")


def _assigned(statements: Iterable[ast.stmt]) -> Iterator[str]:
    """The names that statements assign outside functions and classes; what they import is not among them."""
    for statement in statements:
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign) and statement.value:
            targets = [statement.target]
        else:
            targets = []
        for target in targets:
            for node in ast.walk(target):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            yield from _assigned(node for node in ast.iter_child_nodes(statement) if isinstance(node, ast.stmt))


@functools.cache
def owners() -> dict[str, set[str]]:
    """The modules that assign a name at their top level, by this name."""
    found: dict[str, set[str]] = {}
    for path in program_files():
        for name in _assigned(ast.parse(path.read_text(encoding="utf-8")).body):
            found.setdefault(name, set()).add(name_of(path))
    return found


def owner_of(constant: str) -> ModuleType:
    """The one module of the program that assigns a constant: to set it elsewhere would change nothing.

    Raises LookupError if there is no such module, or more than one.
    """
    modules = sorted(owners().get(constant, ()))
    if len(modules) != 1:
        raise LookupError(f"{constant} is assigned by {' and '.join(modules) or 'no module of the program'}")
    return importlib.import_module(modules[0])


def constant(name: str) -> Any:
    """The value of a constant of the program, wherever it is."""
    return getattr(owner_of(name), name)


def set_limits(put: Callable[[ModuleType, str, Any], object], /, **values: object) -> None:
    """Change constants of the program, in this process; `put` is setattr(), or a monkeypatch's."""
    for name, value in values.items():
        put(owner_of(name), name, value)


def code_with_limits(**values: object) -> str:
    """Python code that changes constants of the program, for a process to begin with."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in values.items())
    found = f"import sys; sys.path.append({str(TESTS)!r}); from support import program"
    return f"{found}; program.set_limits(setattr, {arguments})\n"
