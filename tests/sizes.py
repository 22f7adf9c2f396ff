"""Say what of the program is longer than pyproject.toml allows; usage: python tests/sizes.py"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from support.program import ELF, PACKAGE, ROOT, program_files


def limits_of(root: Path) -> dict[str, int]:
    """What [tool.elf] of pyproject.toml says. Python 3.10 can't read TOML."""
    section = re.search(r"^\[tool\.elf\]$(.*?)(?=^\[|\Z)", (root / "pyproject.toml").read_text(), re.M | re.S)
    return {name: int(value) for name, value in re.findall(r"^(\w+) *= *(\d+)", section[1] if section else "", re.M)}


def too_long(path: Path, root: Path, limits: dict[str, int]) -> Iterator[str]:
    """Say what is too long in a file, or that the file is."""
    source, where = path.read_text(encoding="utf-8"), path.relative_to(root)
    key = {root / ELF.name: "elf_lines"}.get(path, "module_lines" if path.parent.name == PACKAGE.name else "")
    if key and (lines := len(source.splitlines())) > limits[key]:
        yield f"{where}: {lines} lines, more than {limits[key]}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            most = limits["class_lines" if isinstance(node, ast.ClassDef) else "function_lines"]
            if (lines := (node.end_lineno or 0) - node.lineno + 1) > most:
                yield f"{where}:{node.lineno}: {node.name} has {lines} lines, more than {most}"


def main() -> int:
    limits = limits_of(ROOT)
    found = [line for path in (*program_files(), ROOT / "locustfile.py") for line in too_long(path, ROOT, limits)]
    print("\n".join(found) or "nothing is too long")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
