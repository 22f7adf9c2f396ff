"""What ELF says of a failure: found by its name, so that no test has the words; and which names no test has seen."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator

from iot_elf.text import printable
from support.program import constant, program_files
from support.shell import Result

Explained = Callable[..., None]  # explained(result, "KeyMissing", "thing_0", path)
SEEN = set[str]()  # the names that tests of this process have looked at
# What no test passes to explained(), or expects of failure_of().
UNSEEN = {
    "WrongUsage": "is told in one line, as argparse does; commands/test_options.py has it",
    "OutputClosed": "there is no output for a summary to be in; failures/test_readers.py has its words",
    "LocalUnanswered": "takes longer than a test may",
    "RoleSessionEnded": "is what things of a run fail with; commands/test_sign_in.py has its words",
    "TooManySockets": "is of Windows alone; unit/test_network.py has it",
}


def _first_words(node: ast.AST) -> Iterator[ast.expr]:
    """What may be the name of a failure: how an error that is made begins, or a row of name, cause and remedy."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        yield from node.exc.args[:1]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("Error", "super().__init__")):
        yield from node.args[:1]
    elif isinstance(node, ast.Assign):
        targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        if ast.unparse(targets[0]) in ("name", "NO_THINGS"):
            yield values[0]
    elif isinstance(node, ast.Dict):
        yield from (value.elts[0] for value in node.values if isinstance(value, ast.Tuple) and len(value.elts) == 3)


def failure_names() -> set[str]:
    """The names of the failures that elf.py and iot_elf/ know or make."""
    nodes = (node for path in program_files() for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    words = (word.value for node in nodes for word in _first_words(node) if isinstance(word, ast.Constant))
    made = {word for word in words if isinstance(word, str) and word.isidentifier() and word[0].isupper()}
    return made | {names.split()[0] for names in constant("FAILURES")}


def failure_of(result: Result) -> str:
    """The name of a command's failure, from its JSON summary; "" if it has none."""
    name = str(json.loads(result.out.splitlines()[-1]).get("error", {}).get("name", ""))
    SEEN.add(name)
    return name


def assert_explained(result: Result, name: str, *facts: object) -> None:
    """Make sure that a command has told a failure of this name in two lines, which have these facts, and shown no code.

    ELF itself says which failure it was: in this process, or else in the summary of --output json.
    """
    SEEN.add(name)
    failures = [failure for failure in result.failures if failure.name == name]
    assert failures, f"{name} is not among {[failure.name for failure in result.failures]}:\n{result.err}"
    lines = result.err.splitlines()
    for cause, remedy in ((printable(failure.cause), f" what to do: {failure.remedy}") for failure in failures):
        said = [line.partition(" - ")[2] or line for line in lines if line.endswith(f" {cause}")]
        helped = [line for line in lines if line.endswith(remedy)]
        if said and helped:
            break
    else:
        raise AssertionError(f"{failures} is not told in:\n{result.err}")
    assert len({*said}) == len(said)  # one for each thing
    assert len(helped) == 1
    told = said[0] + remedy
    assert [fact for fact in map(str, facts) if fact not in told] == [], told
    assert "None" not in told
    assert "Traceback" not in result.out + result.err or ":DEBUG - " in result.err
