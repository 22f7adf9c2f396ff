# SPDX-License-Identifier: Apache-2.0
"""Messages from templates: only for `send --template`."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from iot_elf import defaults
from iot_elf.errors import ElfError, UsageError
from iot_elf.messages import PayloadBuilder
from iot_elf.text import by_number


@functools.cache
def sandbox() -> Any:
    """Return Jinja2's sandbox, without what has random numbers that --seed does not repeat."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    del environment.filters["random"], environment.globals["lipsum"]
    return environment


class TemplateContext:
    """What a thing's templates use: its random numbers, and its values that continue from message to message.

    The first call of `walk` in a rendering continues from the first in the previous one, and so on; `ramp` does too.
    Time is that of the schedule, or a wave would depend on the machine.
    """

    def __init__(self, thing: str, seed: int | None, interval_s: float) -> None:
        import random
        import uuid

        chance = self._chance = random.Random(None if seed is None else f"{seed} {thing}")  # noqa: S311
        self._phase, self._interval_s = chance.random(), interval_s or defaults.INTERVAL_S
        self._number = 0
        self._values: dict[tuple[str, int], float] = {}  # by function and which of its calls in a rendering it is
        self._calls: collections.Counter[str] = collections.Counter()
        self._names: dict[str, Any] = {
            "thing_name": thing,
            "thing_number": by_number(thing)[1],
            **{name: getattr(chance, name) for name in ("uniform", "gauss", "randint")},
            "choice": lambda *values: chance.choice(values[0] if len(values) == 1 else values),
            "uuid": lambda: str(uuid.UUID(int=chance.getrandbits(128), version=4)),
            **{"walk": self._walk, "ramp": self._ramp, "sine": self._sine},
        }

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

    def _walk(self, start: float, step: float, low: float = -math.inf, high: float = math.inf) -> float:
        return self._next("walk", start, lambda value: min(max(value + self._chance.uniform(-step, step), low), high))

    def _ramp(self, start: float, step: float) -> float:
        return start + step * self._next("ramp", 0, lambda value: value + 1)

    def _sine(self, period_s: float, low: float, high: float) -> float:
        turns = self._number * self._interval_s / period_s + self._phase
        return low + (high - low) * (1 + math.sin(math.tau * turns)) / 2


class Template:
    """What the things send, rendered for each message of each thing; each thing has a TemplateContext."""

    def __init__(
        self, text: bytes, make: Callable[[bytes], PayloadBuilder], context_of: Callable[[str], TemplateContext]
    ) -> None:
        """Compile the text; `make` turns its results into what is sent. Raises UsageError."""
        self._make, self.context_of, environment = make, context_of, sandbox()
        with self._naming_line():
            from jinja2 import meta, nodes

            tree = environment.parse(text.decode("utf-8"))
            known = {*context_of("").names(1), *environment.globals}
            if unknown := meta.find_undeclared_variables(tree) - known:
                first = next(name for name in tree.find_all(nodes.Name) if name.name in unknown)
                raise UsageError(
                    "TemplateFails",
                    f"the template failed: line {first.lineno}: unknown name {first.name!r}",
                    f"use one of {', '.join(sorted(known))}",
                )
            self._template = environment.from_string(tree)

    def payload(self, topic: str, thing: str, number: int) -> bytes:
        """Render it, and return the payload that a PayloadBuilder makes of the result. Raises UsageError."""
        pieces, size = [], 0
        with self._naming_line():
            for piece in self._template.generate(self.context_of(thing).names(number)):
                pieces.append(piece)
                if (size := size + len(piece)) > defaults.MAX_PAYLOAD_BYTES:
                    break
            text = "".join(pieces).encode("utf-8")
        return self._make(text).payload(topic, thing, number)

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
            cause = f"the template failed: line {line}: {reason}"
            raise UsageError("TemplateFails", cause, "see docs/messages.md for what templates can use") from error
