"""Break a module in one place at a time, and say which of its unit tests notices.

    python tests/mutants.py outbox metrics          # all of two modules
    python tests/mutants.py outbox:115 device:60-90  # some of their lines

A mutant is a copy of the program with one change: a comparison's bound moved or its sense turned round, an operator or
a condition exchanged, a number or a truth value changed, a returned value left out, a statement deleted, an order
reversed, one end of a queue or of a range taken for the other. Words are left alone, and so are log.debug(), types and
imports. tests/unit/test_MODULE.py runs against each, in a temporary directory; what it does not notice is a survivor,
and either a test is missing or the change makes no difference.

mutmut leaves out what has a decorator, and so each property, and constants of modules; cosmic-ray changes the working
tree, one test process after the other. Neither deletes a statement or reverses an order.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import importlib
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CPU_S = 20  # of a test run: a loop may be without end
WAIT_S = 120.0  # the same, if it waits
MAX_BYTES = 4 << 30  # of its memory: such a loop may fill a list
# What the tests import that is not the program, so that each process that is forked has it already.
IMPORTED_FIRST = "pytest boto3 botocore.loaders paho.mqtt.client psutil pyte jinja2.sandbox".split()

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_PAIRS = (
    "min max,any all,popleft pop,append appendleft,bisect_left bisect_right,startswith endswith,"
    "removeprefix removesuffix,lstrip rstrip,partition rpartition"
)
EXCHANGED = {a: b for pair in _PAIRS.split(",") for a, b in (pair.split(), pair.split()[::-1])}  # what is called
IN_ORDER = ("list", "tuple", "deque", "iter")  # these keep the order of what they are given
LEFT_ALONE = ("annotation", "returns", "decorator_list", "bases", "format_spec")  # fields of the syntax tree


class Mutant(NamedTuple):
    line: int
    change: str
    source: str  # of the whole module


def mutants_of(source: str) -> Iterator[Mutant]:
    """Yield a module's mutants, from its top to its end."""
    tree = ast.parse(source)

    def within(node: ast.AST) -> Iterator[Mutant]:
        for field, value in ast.iter_fields(node):
            if field in LEFT_ALONE:
                continue
            for place, child in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(child, ast.AST) or _is_left_alone(child):
                    continue
                for other in (*_of_statement(child), *_of_expression(child), *_of_order(field, child)):
                    change = f"{_short(child)}  ->  {_short(other)}"
                    _put(node, field, place, other)
                    yield Mutant(getattr(child, "lineno", 0), change, ast.unparse(ast.fix_missing_locations(tree)))
                    _put(node, field, place, child)
                yield from within(child)

    return within(tree)


def _put(node: ast.AST, field: str, place: int, child: ast.AST) -> None:
    if isinstance(children := getattr(node, field), list):
        children[place] = child
    else:
        setattr(node, field, child)


def _is_left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return ast.unparse(node.value.func) == "log.debug"
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _short(node: ast.AST) -> str:
    lines = ast.unparse(node).splitlines() or [""]
    return lines[0][:90] + (" …" if len(lines) > 1 or len(lines[0]) > 90 else "")


def _of_statement(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what can stand in the place of a statement."""
    if isinstance(node, ast.Return):
        yield ast.Return() if node.value and ast.unparse(node.value) != "None" else ast.Pass()
    elif isinstance(node, ast.Expr):
        if isinstance(node.value, (ast.Call, ast.Yield, ast.YieldFrom)):
            yield ast.Pass()
    elif isinstance(node, ast.Assign):
        if any(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets):
            yield ast.Pass()
    elif isinstance(node, (ast.AugAssign, ast.Delete, ast.Raise, ast.Continue, ast.Break)):
        yield ast.Pass()
        if isinstance(node, ast.AugAssign):
            yield ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)
    elif isinstance(node, ast.If) and not isinstance(node.test, (ast.Compare, ast.UnaryOp)):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)


def _of_expression(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what can stand in the place of an expression."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for kind in COMPARISONS[type(operator)]:
                yield ast.Compare(node.left, [*node.ops[:place], kind(), *node.ops[place + 1 :]], node.comparators)
    elif isinstance(node, ast.BinOp):
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for place in range(len(node.values)) if len(node.values) > 2 else ():
            yield ast.BoolOp(node.op, [*node.values[:place], *node.values[place + 1 :]])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Call):
        yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[ast.AST]:
    name = str(getattr(node.func, "attr", getattr(node.func, "id", "")))
    if other := EXCHANGED.get(name):
        called = ast.Attribute(node.func.value, other) if isinstance(node.func, ast.Attribute) else ast.Name(other)
        yield ast.Call(called, node.args, node.keywords)
    if name == "sorted":
        yield _reversed(node)
    elif name in IN_ORDER and node.args and not isinstance(node.args[0], ast.List):
        yield ast.Call(node.func, [_reversed(node.args[0]), *node.args[1:]], node.keywords)
    for place, keyword in enumerate(node.keywords):
        if keyword.arg:
            yield ast.Call(node.func, node.args, [*node.keywords[:place], *node.keywords[place + 1 :]])


def _of_order(field: str, child: ast.AST) -> Iterator[ast.AST]:
    """Yield the reverse of what a loop, or a comprehension, takes one after the other."""
    if field == "iter" and isinstance(child, ast.expr) and "count(" not in ast.unparse(child):
        yield _reversed(child)


def _reversed(order: ast.expr) -> ast.expr:
    return ast.parse(f"reversed(list({ast.unparse(order)}))", mode="eval").body


class Attempt(NamedTuple):
    """A mutant whose tests are running."""

    mutant: Mutant
    directory: Path
    deadline: float


class Workshop:
    """Copies of the repository, one a process, in which a module is broken and its tests run."""

    def __init__(self, jobs: int, top: Path) -> None:
        self.free = [top / str(number) for number in range(jobs)]
        for directory in self.free:
            ignore = shutil.ignore_patterns(".git", "__pycache__", "venv", ".*", "docs", "benchmarks")
            shutil.copytree(ROOT, directory, ignore=ignore)
            compileall.compile_dir(directory, quiet=2)

    def test(self, module: str, directory: Path) -> int:
        """Run a module's unit tests in a process of its own, and return its ID."""
        if pid := os.fork():
            return pid
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
            with (directory / "output").open("w") as output:
                for number in (1, 2):
                    os.dup2(output.fileno(), number)
            os.chdir(directory)
            sys.path[0] = str(directory / "tests")
            sys.dont_write_bytecode = True
            options = "-x -q -rf --tb=no --color=no -p no:cacheprovider -p no:xdist -o addopts=".split()
            status = int(importlib.import_module("pytest").main([*options, f"tests/unit/test_{module}.py"]))
            sys.stdout.flush()
        except BaseException:
            status = 99
        os._exit(status)

    def run(self, module: str, mutants: list[Mutant]) -> Iterator[tuple[Mutant, str]]:
        """Yield each mutant with the test that noticed it, or ""; in the order in which they end."""
        relative = Path("elf.py") if module == "elf" else Path("iot_elf") / f"{module}.py"
        left, running = list(reversed(mutants)), dict[int, Attempt]()
        while left or running:
            while left and self.free:
                mutant, directory = left.pop(), self.free.pop()
                (directory / relative).write_text(mutant.source)
                running[self.test(module, directory)] = Attempt(mutant, directory, time.monotonic() + WAIT_S)
            for pid, attempt in list(running.items()):
                is_late = time.monotonic() > attempt.deadline
                if is_late:
                    os.kill(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, 0 if is_late else os.WNOHANG)
                if ended:
                    del running[pid]
                    self.free.append(attempt.directory)
                    yield attempt.mutant, "" if status == 0 else self._noticed_by(attempt.directory, status)
            time.sleep(0.01)
        for directory in self.free:
            shutil.copy(ROOT / relative, directory / relative)

    @staticmethod
    def _noticed_by(directory: Path, status: int) -> str:
        if os.WIFSIGNALED(status):
            return "(it did not end)"
        output = (directory / "output").read_text(errors="replace")
        found = re.search(r"^(?:FAILED|ERROR) \S*?(?:::(\S+))?(?: - .*)?$", output, re.M)
        return (found[1] if found else None) or "(it can't be imported)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", metavar="MODULE[:LINE[-LINE]]", help="of iot_elf/, or elf")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (%(default)s)")
    parser.add_argument("--survivors", action="store_true", help="show only what nobody noticed")
    options = parser.parse_args()
    for name in IMPORTED_FIRST:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    summaries = []
    with tempfile.TemporaryDirectory() as top:
        workshop = Workshop(options.jobs, Path(top))
        for given in options.modules:
            module, _, lines = given.partition(":")
            first, _, last = lines.partition("-")
            source = (ROOT / ("elf.py" if module == "elf" else f"iot_elf/{module}.py")).read_text(encoding="utf-8")
            mutants = [
                each for each in mutants_of(source) if not lines or int(first) <= each.line <= int(last or first)
            ]
            untouched = Mutant(0, "", source)
            if failed := [test for _, test in workshop.run(module, [untouched]) if test]:
                sys.exit(f"tests/unit/test_{module}.py fails although nothing is broken: {failed[0]}")
            survivors = []
            for mutant, test in workshop.run(module, mutants):
                if not test:
                    survivors.append(mutant)
                if not test or not options.survivors:
                    print(f"{module}:{mutant.line}: {mutant.change}: {test or 'NOBODY NOTICED'}", flush=True)
            summaries.append(f"{module}: {len(mutants) - len(survivors)} of {len(mutants)} noticed")
            summaries += [f"    {each.line}: {each.change}" for each in sorted(survivors)]
    print("\n".join(summaries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
