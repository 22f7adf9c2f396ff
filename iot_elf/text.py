# SPDX-License-Identifier: Apache-2.0
"""Words and numbers for people; the loggers; what may be printed, and what is secret."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from iot_elf import defaults

log = logging.getLogger("iot-elf")
detail_log = log.getChild("each")  # for lines about one thing or one message, which hide_details_above() may hide
report_log = log.getChild("last")  # for a command's final report, shown even with --quiet
report_log.setLevel(logging.INFO)
KEY_ID_CHARACTERS = 16  # minimum (AccessKey, IAM API reference); shorter values may be normal words
MAX_SHOWN = 60  # characters of a value, in an error
_secrets: frozenset[str] = frozenset()  # each as Python, JSON and URLs may write it


def short_path(path: Path) -> Path:
    """Return a path as a person would type it here."""
    with contextlib.suppress(OSError, ValueError):  # the working directory is gone; the path is not below it
        return path.relative_to(Path.cwd())
    return path


# How the commands of a remedy begin, by how the program's texts write it.
typed_as = {"elf.py": "python elf.py", "elf.py create": "python elf.py create", "aws": "aws"}


def remember_how_elf_was_typed(options: str) -> None:
    """Let remedies begin ELF's commands as this process was begun, with uv or this Python; `options` end in a space."""
    import shlex
    import sys

    script, typed = sys.argv[0], "python elf.py"
    if Path(script).name == "elf.py" and script in sys.orig_argv:  # not where elf.py is imported
        python = sys.orig_argv[: sys.orig_argv.index(script)]
        typed = shlex.join([*(("uv", "run") if os.environ.get("UV") else python), script])
    typed_as["elf.py"] = f"{typed} {options}".rstrip()
    typed_as["elf.py create"] = f"{typed_as['elf.py']} create"


def as_typed(words: str) -> str:
    """Write the commands in backticks, which the program's texts begin with `elf.py` or `aws`, as they can be typed."""
    known = r"(?<=`)(elf\.py create(?=[ `])|elf\.py(?= )|aws(?= iot| sts))|(?<=\| )elf\.py(?= )"
    return re.sub(known, lambda it: typed_as[it[0]], words)


def without_password(words: str) -> str:
    """Hide the user and password of each URL."""
    return re.sub("//[^/ ]*@", "//***@", words)


def add_secret(*values: str | None, least: int = KEY_ID_CHARACTERS) -> None:
    """Never show a credential, or a user and password, however a library writes it in its messages."""
    global _secrets
    import urllib.parse

    for value in filter(None, values):
        escaped = value.encode("unicode_escape").decode(), json.dumps(value)[1:-1], repr(value)[1:-1]
        forms = {value, urllib.parse.quote(value), urllib.parse.quote(value, safe=""), *escaped, *value.split()}
        _secrets |= {form for form in forms if len(form) >= least}


def hide_environment() -> None:
    """Hide the credentials in the environment, and the passwords in its URLs."""
    for name, value in os.environ.items():
        if re.fullmatch("AWS_(ACCESS_KEY_ID|SECRET_ACCESS_KEY|(SESSION|SECURITY|CONTAINER_AUTHORIZATION)_TOKEN)", name):
            add_secret(value)
        elif re.search("(?i)_PROXY$|^AWS_ENDPOINT_URL", name) and (user := re.match("(?:[^/]*//)?(.+)@", value)):
            add_secret(user[1], user[1].partition(":")[2], least=4)  # a proxy needs no scheme


def redacted(text: str) -> str:
    """Replace secrets in a text by ***. All output passes here: log lines, tracebacks, values of JSON, usage errors.

    It has to be whole: of a text that was cut before, half a secret may be left.
    """
    for secret in _longest_first(_secrets):
        text = text.replace(secret, "***")
    return text


@functools.lru_cache(1)
def _longest_first(secrets: frozenset[str]) -> list[str]:
    return sorted(secrets, key=len, reverse=True)


def redacted_values(value: Any) -> Any:
    """Do the same to the texts in what becomes JSON, whose numbers, words and names of members stay as they are."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {name: redacted_values(each) for name, each in value.items()}
    return [redacted_values(each) for each in value] if isinstance(value, list | tuple) else value


def printable(text: str) -> str:
    """Escape control characters, which could move the cursor, change colours or clear the terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def decoded(payload: bytes) -> str:
    return payload.decode("utf-8", errors="backslashreplace")


def on_one_line(message: str) -> str:
    """Return a message; one that is JSON without its line breaks and indentation, in which it says the same."""
    return re.sub(r"\s*\n\s*", " ", message) if message[:1] in ("{", "[") else message


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def by_number(thing: str) -> tuple[str, int]:
    """Return the sort key of a thing's name: its prefix and number."""
    prefix, _, number = thing.rpartition("_")
    return prefix, int(number) if number.isdecimal() else 0


def listed(things: Iterable[str]) -> str:
    """Return things' names in order, only the first MAX_LISTED if there are more."""
    names, most = sorted(things, key=by_number), defaults.MAX_LISTED
    if len(names) <= most or detail_log.isEnabledFor(defaults.VERBOSE):
        return ", ".join(names)
    return f"{', '.join(names[:most])}, and {len(names) - most} more"


def shown(value: str) -> str:
    """Return a value in quotes, cut if it is long."""
    return repr(value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}…")


def typed_names(things: Iterable[str]) -> str:
    """Return things' names as a command that is shown has them; NAME… stands for too many."""
    names = sorted(things, key=by_number)
    options_end = "-- " if any(name.startswith("-") for name in names) else ""
    return "NAME…" if len(names) > defaults.MAX_LISTED else options_end + " ".join(names)


def utc_time(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_s))


def local_time(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
