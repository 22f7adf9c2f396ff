"""How the program is laid out: which module uses which, who has a constant, and how long things are.

elf.py is the program; what it is built on is in iot_elf/, where the docstring of __init__.py lists the modules, one
line a module, each below those that it uses. Those below "on demand" are imported only in the branch that needs them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import sizes
from support import program
from support.program import PACKAGE, ROOT, Limits

ON_DEMAND = {"templates", "diagnosis", "charts", "report", "local_aws"}  # at least


class Import(NamedTuple):
    """Of one module of the program by another, or of a name in it."""

    module: str  # "elf", or the name of one in iot_elf/
    name: str  # in this module; "" for the module itself
    bound: str  # the name by which it is known here
    at_start: bool  # whether it is executed when the file is imported


class Source:
    """One file of the program."""

    def __init__(self, path: Path, root: Path) -> None:
        self.name, self.is_in_package = path.stem, path.parent != root
        self.where = path.relative_to(root).as_posix()
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.imports = list(self._imports(self.tree, at_start=True))

    def _imports(self, parent: ast.AST, at_start: bool) -> Iterator[Import]:
        for node in ast.iter_child_nodes(parent):
            is_run = at_start and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                is_run = False
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield from self._import(alias.name, "", alias.asname or alias.name, is_run)
            elif isinstance(node, ast.ImportFrom):
                path = ".".join([PACKAGE.name] * bool(node.level) + [node.module] * bool(node.module))
                for alias in node.names:
                    yield from self._import(path, alias.name, alias.asname or alias.name, is_run)
            yield from self._imports(node, is_run)

    @staticmethod
    def _import(path: str, name: str, bound: str, at_start: bool) -> Iterator[Import]:
        package, _, module = path.partition(".")
        if package == PACKAGE.name:
            if not module and name:  # from iot_elf import text
                module, name = name, ""
            yield Import(module, name, bound, at_start)
        elif path in ("elf", "locustfile"):
            yield Import(path, name, bound, at_start)

    @property
    def modules(self) -> set[str]:
        """The names by which modules of iot_elf/ are known here."""
        return {each.bound for each in self.imports if not each.name and each.module not in ("elf", "locustfile")}

    @property
    def own_names(self) -> set[str]:
        """All that is defined here, be it a function, a method, a variable or an attribute."""
        names = set()
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
        return names

    @property
    def others_names(self) -> set[str]:
        """The attributes that are used here, and the names imported from modules of the program."""
        used = {node.attr for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)}
        return used | {each.name for each in self.imports}

    def locals(self, parent: ast.AST, in_class: bool = False) -> Iterator[str]:
        """The parameters and variables, but for the attributes that a class lists."""
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.arg):
                yield node.arg
            elif isinstance(node, ast.ExceptHandler) and node.name:
                yield node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and not in_class:
                yield node.id
            is_body = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from self.locals(node, (in_class or isinstance(node, ast.ClassDef)) and not is_body)


class Program:
    """elf.py, locustfile.py and iot_elf/ in a directory, and what is wrong with their layout."""

    def __init__(self, root: Path) -> None:
        package = sorted((root / PACKAGE.name).glob("*.py"))
        paths = [root / "elf.py", root / "locustfile.py", *package]
        self.sources = [Source(path, root) for path in paths if path.exists()]
        self.package = [source for source in self.sources if source.is_in_package]
        self.listed, self.on_demand = self._read_list()

    def _read_list(self) -> tuple[list[str], set[str]]:
        """Return the modules of iot_elf/ as listed, and which of them are on demand."""
        listed: list[str] = []
        first_on_demand = None
        head = next((source.tree for source in self.package if source.name == "__init__"), None)
        for line in ((head and ast.get_docstring(head)) or "").splitlines():
            if re.match(r"\W*(\w+ )?on demand\b", line, re.IGNORECASE):
                first_on_demand = len(listed)
            elif found := re.match(r"\s*(\w+) {2,}\S", line):
                listed.append(found[1])
        return listed, set() if first_on_demand is None else set(listed[first_on_demand:])

    def the_list(self) -> Iterator[str]:
        """Each module is listed once, and what is listed is a module."""
        names = {source.name for source in self.package} - {"__init__"}
        yield from (f"{name} is not listed in iot_elf/__init__.py" for name in sorted(names - {*self.listed}))
        yield from (f"{name} is listed, and is no module" for name in sorted({*self.listed} - names))
        yield from (f"{name} is listed twice" for name in sorted({*self.listed}) if self.listed.count(name) > 1)
        yield from (f"{name} is not listed as on demand" for name in sorted(names & ON_DEMAND - self.on_demand))

    def arrows(self) -> Iterator[str]:
        """A module uses only those that are listed above it; nothing in iot_elf/ imports elf or locustfile.

        In a function it may use one on demand, if that uses only those above the module.
        """
        uses = {source.name: {each.module for each in source.imports} - {""} for source in self.package}
        for source in self.package:
            above = {*self.listed[: self.listed.index(source.name)]} if source.name in self.listed else set()
            for each in source.imports:
                is_below = each.module not in above
                if each.module in self.on_demand and not each.at_start:
                    is_below = not uses[each.module] <= above
                if each.module and is_below:
                    yield f"{source.where} imports {each.module}, which does not stand above it"

    def demand(self) -> Iterator[str]:
        """What is on demand is imported in functions alone."""
        for source in self.sources:
            for each in source.imports:
                if each.module in self.on_demand and each.at_start:
                    yield f"{source.where} imports {each.module} at its top level"

    def constants(self) -> Iterator[str]:
        """No constant is imported by its name: it would be a copy, which does not change with the constant."""
        for source in self.sources:
            for each in source.imports:
                if re.fullmatch(r"\*|[A-Z][A-Z0-9_]+", each.name):
                    yield f"{source.where} imports {each.name} from {each.module}"

    def underscores(self) -> Iterator[str]:
        """What a module calls its own with an underscore is used by no other."""
        own = {source.where: source.own_names for source in self.sources}
        for source in self.sources:
            others = {name for where, names in own.items() if where != source.where for name in names}
            for name in sorted(source.others_names & others - own[source.where]):
                if re.match("_(?!_)", name):
                    yield f"{source.where} uses {name} of another module"

    def shadows(self) -> Iterator[str]:
        """No variable or parameter has the name of a module that its file imports."""
        for source in self.sources:
            for name in sorted(source.modules & {*source.locals(source.tree)}):
                yield f"{source.where} has a variable of the name of the module {name}"


RULES = ("the_list", "arrows", "demand", "constants", "underscores", "shadows")
HEAD = """What elf.py is built on.

Each uses only those above it:

text       words
errors     what is wrong
device     a thing

on demand:
diagnosis  why
"""


@pytest.fixture(scope="module")
def layout() -> Program:
    return Program(ROOT)


@pytest.mark.xdist_group("layout")  # reading it all takes a second
@pytest.mark.parametrize("rule", RULES)
def test_the_program_keeps_to(layout: Program, rule: str) -> None:
    assert list(getattr(layout, rule)()) == []


def lay_out(root: Path, **files: str) -> Program:
    """Make a program whose modules are as listed above, but for some files."""
    good = {
        "elf": "from iot_elf import text\nLIMIT = text.WIDTH\ndef run():\n    from iot_elf import diagnosis\n",
        "__init__": f'"""{HEAD}"""\n',
        "text": "WIDTH = 80\nclass Word:\n    _own = 1\n",
        "errors": "import re\nfrom iot_elf import text\n",
        "device": "from iot_elf import errors\nfrom iot_elf.text import Word\nclass Device:\n    errors: int\n",
        "diagnosis": "from iot_elf import device, text\n",
    }
    (root / PACKAGE.name).mkdir()
    for name, content in {**good, **files}.items():
        path = root / f"{name}.py" if name in ("elf", "locustfile") else root / PACKAGE.name / f"{name}.py"
        path.write_text(content)
    return Program(root)


@pytest.mark.parametrize("rule", RULES)
def test_a_good_layout_is_called_good(tmp_path: Path, rule: str) -> None:
    laid_out = lay_out(tmp_path)
    assert (laid_out.listed, laid_out.on_demand) == (["text", "errors", "device", "diagnosis"], {"diagnosis"})
    assert list(getattr(laid_out, rule)()) == []


@pytest.mark.parametrize(
    ("rule", "name", "content"),
    [
        ("the_list", "network", ""),
        ("the_list", "__init__", f'"""{HEAD}mqtt       clients"""'),
        ("the_list", "__init__", f'"""{HEAD.replace("on demand:", "")}"""'),
        ("the_list", "__init__", f'"""{HEAD}text       again"""'),
        ("arrows", "device", "import elf"),
        ("arrows", "text", "def run():\n    from iot_elf import diagnosis"),
        ("arrows", "device", "def run():\n    from elf import main"),
        ("arrows", "text", "from iot_elf import errors"),
        ("arrows", "text", "from . import errors"),
        ("arrows", "text", "from .errors import Error"),
        ("arrows", "text", "import iot_elf.errors as failures"),
        ("arrows", "text", "def run():\n    from iot_elf.errors import Error"),
        ("arrows", "text", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from iot_elf.errors import Error"),
        ("demand", "elf", "from iot_elf import diagnosis"),
        ("demand", "elf", "try:\n    from iot_elf.diagnosis import why\nfinally:\n    pass"),
        ("demand", "locustfile", "import iot_elf.diagnosis"),
        ("constants", "errors", "from iot_elf.text import WIDTH"),
        ("constants", "elf", "def run():\n    from iot_elf.text import WIDTH as width"),
        ("constants", "locustfile", "from elf import LIMIT"),
        ("constants", "errors", "from iot_elf.text import *"),
        ("underscores", "errors", "from iot_elf import text\ntext.Word._own"),
        ("underscores", "elf", "from iot_elf.text import Word\ndef run(word):\n    return word._own"),
        ("shadows", "errors", "from iot_elf import text\ndef run(text): pass"),
        ("shadows", "errors", "from iot_elf import text\ndef run():\n    text = 1"),
        (
            "shadows",
            "errors",
            "from iot_elf import text\nclass Error:\n    def run(self):\n        for text in (): 1",
        ),
        ("shadows", "elf", "def run():\n    from iot_elf import text\n    return [text for text in '']"),
    ],
)
def test_a_fault_of_the_layout_is_found(tmp_path: Path, rule: str, name: str, content: str) -> None:
    laid_out = lay_out(tmp_path, **{name: content})
    assert len(list(getattr(laid_out, rule)())) == 1


# Constants


@pytest.mark.parametrize("name", ["NO_SUCH_CONSTANT_S", "Path", "main", "threading"])
def test_only_a_constant_of_the_program_can_be_changed(limits: Limits, name: str) -> None:
    with pytest.raises(LookupError, match=f"{name} is assigned by no module of the program"):
        limits(**{name: 1})


def test_a_constant_that_two_modules_assign_can_not_be_changed(
    limits: Limits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows whose value counts; what only imports it, or assigns it in a function, does not have it."""
    contents = ("A_S = B_S = C_S = 1", "B_S: int = 2\nfrom one import A_S", "def run():\n    C_S = 3\nD_S: int")
    paths = [tmp_path / f"{name}.py" for name in ("one", "two", "three")]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content)
    monkeypatch.setattr(program, "ROOT", tmp_path)
    monkeypatch.setattr(program, "program_files", lambda: paths)
    monkeypatch.syspath_prepend(tmp_path)
    program.owners.cache_clear()
    try:
        with pytest.raises(LookupError, match="B_S is assigned by one and two"):
            limits(B_S=1)
        with pytest.raises(LookupError, match="D_S is assigned by no module"):
            limits(D_S=1)
        assert [program.owner_of(name).__name__ for name in ("A_S", "C_S")] == ["one", "one"]
    finally:
        program.owners.cache_clear()


# Sizes


def test_what_is_too_long_is_found(tmp_path: Path) -> None:
    limits = {"elf_lines": 6, "module_lines": 4, "function_lines": 3, "class_lines": 5}
    assert sizes.limits_of(ROOT).keys() == limits.keys()
    path = tmp_path / "elf.py"
    source = "class Long:\n    @property\n    def short(self):\n        1\n        return 2\n"
    path.write_text(source + "\n")
    assert list(sizes.too_long(path, tmp_path, limits)) == []
    path.write_text(source + "    def long(self):\n        1\n        2\n        3\n")
    assert list(sizes.too_long(path, tmp_path, limits)) == [
        "elf.py: 9 lines, more than 6",
        "elf.py:1: Long has 9 lines, more than 5",
        "elf.py:6: long has 4 lines, more than 3",
    ]
    (tmp_path / PACKAGE.name).mkdir()
    module = tmp_path / PACKAGE.name / "text.py"
    module.write_text("\n" * 5)
    assert list(sizes.too_long(module, tmp_path, limits)) == ["iot_elf/text.py: 5 lines, more than 4"]
