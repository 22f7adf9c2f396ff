# SPDX-License-Identifier: Apache-2.0
"""The parser's mechanism: its class, and types of arguments."""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from iot_elf import defaults, state
from iot_elf.errors import ElfError, UsageError
from iot_elf.network import Endpoint, Proxy
from iot_elf.outages import Outage
from iot_elf.places import Place
from iot_elf.text import printable, redacted, remember_how_elf_was_typed, without_password

MAX_THINGS = 100_000  # of `create`: more is a typo
MANY_OPTIONS = 10  # which are not worth a list in front of the list
YEAR_S = 366 * 24 * 3600  # longer is one, too


def positive_int(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 999999999")
    return int(text)


def thing_selection(text: str) -> list[int | str]:
    """Read how many things, or their names and patterns, separated by commas, as state.choose() takes them."""
    parts = text.split(",")
    if not all(parts):
        raise argparse.ArgumentTypeError(f"a number or name is missing in {text!r}")
    # What is like a number is one, if a wrong one: each name has letters or an underscore.
    return [positive_int(part) if re.fullmatch("[-+.0-9]*", part) else part for part in parts]


def thing_count(text: str) -> int:
    if (count := positive_int(text)) > MAX_THINGS:
        hours = f"{MAX_THINGS / defaults.THINGS_PER_S / 3600:.1f} hours at AWS's quotas"
        raise argparse.ArgumentTypeError(f"{count:,} is more than {MAX_THINGS:,} things, which take {hours}")
    return count


def number_between(what: str, least: float, most: float) -> Callable[[str], float]:
    """Return a parser of numbers from `least` to `most`, described as `what`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= float(text) <= most:
                return float(text)
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")

    return parse


seconds = number_between(f"a number of seconds from 0 to {YEAR_S} (a year)", 0, YEAR_S)
interval_s = number_between(
    f"at least {defaults.MIN_INTERVAL_S} seconds (AWS IoT allows 100 messages a second), at most {YEAR_S} (a year)",
    defaults.MIN_INTERVAL_S,
    YEAR_S,
)
things_per_s = number_between("0.1 to 1000 things per second", 0.1, 1000)


def outage(text: str) -> Outage:
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)/([0-9]*\.?[0-9]+)", text)
    length_s, period_s = map(float, match.groups()) if match else (0.0, 0.0)
    if not 0 < length_s < period_s <= YEAR_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not S/S, such as 10/60: 10 s without a connection in each 60 s")
    return Outage(length_s, period_s)


def thing_prefix(text: str) -> str:
    # The client ID is the thing's name, its number of up to 9 digits, and 8 random characters, each after one more.
    longest = defaults.MAX_CLIENT_ID_BYTES - 10 - 9
    if not state.THING_NAME.fullmatch(text) or len(text) > longest:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 to {longest} of the characters a-z A-Z 0-9 : _ -")
    return text


def elf_id(text: str) -> str:
    # "" is what the option has without a value.
    urn = text if not text or text.startswith("urn:uuid:") else f"urn:uuid:{text}"
    if urn and not state.ELF_ID.fullmatch(urn):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an ELF ID, as elf.json and a thing's attribute elf_id have it"
        )
    return urn


def broker_endpoint(text: str) -> Endpoint:
    match = re.fullmatch(r"(?:\[(?P<ipv6>[0-9a-fA-F:.]+)\]|(?P<host>[A-Za-z0-9._-]*))(?::(?P<port>[0-9]{1,5}))?", text)
    port = int(match["port"] or defaults.MQTT_PORT) if match else 0
    if not match or not text or not 0 < port < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST, HOST:PORT or :PORT")
    return Endpoint(match["ipv6"] or match["host"], port if match["port"] else 0)


def directory_path(text: str) -> Path:
    if not text:  # probably from a variable that is not set, and not meant to be the working directory
        raise argparse.ArgumentTypeError("the directory name is empty, here or in ELF_MISC_DIR")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"no home directory found for {text!r}: set HOME, or leave ~ out") from None


def place_part(text: str, key: str) -> str:
    part: dict[str, Any] = {key: text}
    try:
        return str(getattr(Place(**part).checked(), key))
    except ElfError as error:
        raise argparse.ArgumentTypeError(error.cause) from None


def proxy_url(text: str) -> str:
    try:
        if text != defaults.NO_PROXY:
            Proxy.from_url(text, "it")
    except ElfError as error:
        raise argparse.ArgumentTypeError(f"{error.cause}: {error.remedy}") from None
    return text


MEANT = {  # what people type who know other tools
    **{"delete": "clean", "destroy": "clean", "rm": "clean", "publish": "send", "pub": "send", "ls": "list"},
    **{"sub": "subscribe", "listen": "subscribe", "add": "create", "new": "create", "--json": "--output json"},
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with usage errors of one line that may suggest what was meant, and without abbreviations,
    which a later option could break."""

    def __init__(self, **settings: Any) -> None:
        # 80 columns: to find the terminal's width, argparse would import shutil, with three compression libraries.
        formatter = functools.partial(argparse.RawDescriptionHelpFormatter, width=78)
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=formatter, **settings)
        self.commands: list[Parser] = []
        self.typed: list[str] = []
        self._adder: Any = None  # argparse's, once there is a command

    def hide(self) -> Parser:
        """Leave all options out of the help."""
        for option in self._actions:
            option.help = argparse.SUPPRESS
        return self

    def add_command(self, examples: Sequence[str], summary: str, *parents: Parser) -> Parser:
        """Add the command that each of `examples` begins with, and the options of `parents`; return its parser."""
        self._adder = self._adder or self.add_subparsers(dest="command", metavar="COMMAND", title="commands")
        shown = "".join(f"\n  python elf.py {example}" for example in examples)
        others = "Options of every command, such as --region and --output: python elf.py --help"
        command: Parser = self._adder.add_parser(
            examples[0].split()[0],
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"examples:{shown}\n\n{others}",
            parents=parents,
        )
        self.commands.append(command)
        return command

    def format_help(self) -> str:
        """Return the help; its first line does not repeat the options of a command that has many."""
        if not self._adder and sum(it.help != argparse.SUPPRESS for it in self._actions) > MANY_OPTIONS:
            given = "".join(f" [{it.metavar}]" for it in self._get_positional_actions())
            self.usage = f"%(prog)s [options]{given}"
        return super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.typed = list(sys.argv[1:] if args is None else args)
        cli, unknown = super().parse_known_args(self.typed, namespace)
        if unknown:  # else the parser of all commands would report it, with its --help instead of the command's
            quoted = "; a message of several words is one argument: put it in quotes" if hasattr(cli, "message") else ""
            words = "".join(word for word in unknown if word.startswith("-"))
            self.error(f"unrecognized arguments: {' '.join(unknown)}{'' if words else quoted}")
        return cli, unknown

    def print_start_of_help(self) -> None:
        """Print the help without the options, which would scroll the rest away. Raises OSError."""
        self._print_message(self.format_help().partition("options of")[0])

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help, the version, or the end of usage. Raises OSError, which argparse would not."""
        if stream := file or sys.stdout or sys.stderr:
            stream.write(message)
            stream.flush()

    def error(self, message: str) -> NoReturn:
        import difflib

        known = {option for parser in (self, *self.commands) for option in parser._option_string_actions}
        options = [word.partition("=")[0] for word in self.typed if word.startswith("--")]
        refused = re.findall("invalid choice: '(.+?)'", message)
        mistyped = "".join([*(option for option in options if option not in known), *refused][:1])
        known |= {*re.findall(r"[\w-]+", message.partition("choose from")[2])}
        longer = sorted(option for option in known if mistyped and option.startswith(mistyped))
        known_elsewhere = [MEANT[mistyped]] if mistyped in MEANT else []
        meant = longer or known_elsewhere or difflib.get_close_matches(mistyped, known, 1, 0.7)
        suggestion = f"; did you mean {meant[0]}?" if meant else ""
        message = without_password(message)  # which may be in a wrong place
        remember_how_elf_was_typed("")  # its help needs none of the options
        error = UsageError("WrongUsage", f"{message}{suggestion}", f"see `{self.prog} --help`")
        with contextlib.suppress(OSError):
            sys.stderr.write(redacted(printable(f"{self.prog}: error: {error.cause} ({error.remedy})")) + "\n")
        raise error
