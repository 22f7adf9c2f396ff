# SPDX-License-Identifier: Apache-2.0
"""Messages from templates: only for `send --template`."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from iot_elf import defaults
from iot_elf.errors import ElfError, UsageError
from iot_elf.messages import PayloadBuilder, too_long
from iot_elf.text import by_number

MAX_TEMPLATE_BYTES = 512 * 1024  # which take seconds to compile, and Python hears nothing in that time
MAX_REASON = 300  # characters of Python's or Jinja2's reason why a template fails


@functools.cache
def sandbox() -> Any:
    from iot_elf.sandbox import Sandbox

    return Sandbox()


class TemplateContext:
    """What a thing's templates use: its random numbers, and its values that continue from message to message.

    The first call of `walk` in a rendering continues from the first in the previous one, and so on; `ramp` does too.
    Time is that of the schedule, or a wave would depend on the machine.
    """

    def __init__(self, thing: str, seed: int | None, interval_s: float) -> None:
        import random

        self._chance = random.Random(None if seed is None else f"{seed} {thing}")  # noqa: S311
        self._phase, self._interval_s = self._chance.random(), interval_s or defaults.INTERVAL_S
        self._number = 0
        self._values: dict[tuple[str, int], float] = {}  # by function and which of its calls in a rendering it is
        self._calls: collections.Counter[str] = collections.Counter()
        self._names = {"thing_name": thing, "thing_number": by_number(thing)[1], **self._functions()}

    def _functions(self) -> dict[str, Any]:
        """Return what a template can call. Python counts the arguments of what is no method as the user does."""
        import uuid as standard

        chance, step_from = self._chance, self._next

        def uniform(a: float, b: float) -> float:
            return chance.uniform(a, b)

        def gauss(mean: float, deviation: float) -> float:
            return chance.gauss(mean, deviation)

        def randint(a: int, b: int) -> int:
            if not (isinstance(a, int) and isinstance(b, int) and a <= b):
                raise ValueError(f"randint({a}, {b}) needs two whole numbers, the lower one first")
            return chance.randint(a, b)

        def choice(*values: Any) -> Any:
            options = values[0] if len(values) == 1 else values
            if not (isinstance(options, Sequence) and options):
                raise ValueError("choice needs values, or a list of them")
            return chance.choice(options)

        def uuid() -> str:
            return str(standard.UUID(int=chance.getrandbits(128), version=4))

        def walk(start: float, step: float, low: float = -math.inf, high: float = math.inf) -> float:
            value = step_from("walk", start, lambda value: min(max(value + chance.uniform(-step, step), low), high))
            return float(value)  # what takes a field's type from its first value (Timestream) refuses no later one

        def ramp(start: float, step: float) -> float:
            return start + step * step_from("ramp", 0, lambda value: value + 1)

        def sine(period: float, low: float, high: float) -> float:
            turns = self._number * self._interval_s / period + self._phase
            return low + (high - low) * (1 + math.sin(math.tau * turns)) / 2

        return {each.__name__: each for each in (uniform, gauss, randint, choice, uuid, walk, ramp, sine)}

    def names(self, number: int) -> dict[str, Any]:
        """Return the names for the template of the thing's message `number`."""
        self._number, now = number, time.time_ns()
        self._calls.clear()
        return {**self._names, "number": number, "now": now / 1e9, "now_ms": now // 1_000_000}

    def _next(self, function: str, start: float, following: Callable[[float], float]) -> float:
        key = function, self._calls[function]
        self._calls[function] += 1
        self._values[key] = value = following(self._values[key]) if key in self._values else start
        return value


class Template:
    """What the things send, rendered for each message of each thing; each thing has a TemplateContext."""

    topic = ""  # as Message has it

    def __init__(
        self, text: bytes, make: Callable[[bytes], PayloadBuilder], context_of: Callable[[str], TemplateContext]
    ) -> None:
        """Compile the text; `make` turns its results into what is sent. Raises UsageError."""
        self._make, self.context_of, environment = make, context_of, sandbox()
        self.is_object: bool | None = None  # as the first result is: unknown before
        if len(text) > MAX_TEMPLATE_BYTES:
            cause = f"the template is too long: {len(text):,} bytes"
            raise UsageError("TemplateFails", cause, f"use one of at most {MAX_TEMPLATE_BYTES >> 10} KiB")
        with self._naming_line():
            from jinja2 import meta, nodes

            tree = environment.parse(text.decode("utf-8-sig"))
            known = {*context_of("").names(1), *environment.globals}
            if unknown := meta.find_undeclared_variables(tree) - known:
                first = next(name for name in tree.find_all(nodes.Name) if name.name in unknown)
                raise UsageError(
                    "TemplateFails",
                    f"the template failed: line {first.lineno}: unknown name {first.name[:MAX_REASON]!r}",
                    f"use one of {', '.join(sorted(known))}",
                )
            self._template = environment.compiled(tree)

    def payload(self, topic: str, thing: str, number: int) -> bytes:
        """Render it, and return the payload that a PayloadBuilder makes of the result.

        The first result is an object or a text, and so are the others. Raises UsageError, ValueError.
        """
        pieces, size = [], 0
        with self._naming_line():
            for piece in self._template.generate(self.context_of(thing).names(number)):
                pieces.append(piece)
                if (size := size + len(piece)) > defaults.MAX_PAYLOAD_BYTES:
                    raise too_long("message", f"over {defaults.MAX_PAYLOAD_BYTES:,} bytes")
            text = "".join(pieces).encode("utf-8")
        made = self._make(text)
        if self.is_object is None:
            self.is_object = made.is_object
        elif self.is_object and not made.is_object:
            PayloadBuilder.of_object(text)  # raises
        elif made.is_object and not self.is_object:
            raise UsageError(
                "TemplateVaries", "this one is a JSON object, and the first was a text", "let each be the same"
            )
        return made.payload(topic, thing, number)

    @contextlib.contextmanager
    def _naming_line(self) -> Iterator[None]:
        """Raise UsageError, with line and reason, for any error of Python or Jinja2 in the block."""
        try:
            yield
        except ElfError:
            raise
        except Exception as error:
            import traceback

            frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<template>"]
            line = getattr(error, "lineno", None) or (frames or [1])[-1]
            reason = getattr(error, "message", None) or str(error) or type(error).__name__
            if isinstance(error, RecursionError | MemoryError):
                reason = "it nests too deep, or is too large"
            # Without Python's own names; and it may quote what is long.
            reason = re.sub(r"(?:[\w<>]+\.)*(?:sync_do_|do_)?(\w+)\(\)", r"\1()", reason[:MAX_REASON])
            cause = f"the template failed: line {line}: {reason}"
            raise UsageError("TemplateFails", cause, "see docs/messages.md for what templates can use") from error
