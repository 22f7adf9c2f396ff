"""What every benchmark prints: the machine, and a table."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence


def machine() -> str:
    """Describe this machine in a line."""
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{platform.python_implementation()} {platform.python_version()}"
    )


def show(title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: words to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in (heads, *cells)) for column in range(len(heads))]
    print(f"\n{title}\n{machine()}\n")
    for line in (heads, ["-" * width for width in widths], *cells):
        print(
            "  ".join(
                text.ljust(width) if i == 0 else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            )
        )
    sys.stdout.flush()
