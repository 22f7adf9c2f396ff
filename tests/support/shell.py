"""A user of elf.py at a shell, in another process or in this one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from iot_elf import text
from iot_elf.errors import ElfError
from support import forking
from support.aws import Account, AwsService
from support.machine import PATIENCE_S, KeyPress, Terminal, clean_environment, run_in_terminal
from support.program import ELF

PIPE_BYTES = 16384  # that every system's pipe holds


class Result(NamedTuple):
    status: int
    out: str
    err: str
    made: Sequence[ElfError] = ()  # the failures that came about, if ELF ran in this process

    @property
    def failures(self) -> list[ElfError]:
        """What ELF itself says that failed: in this process, and in the summary of --output json."""
        summaries = (json.loads(line) for line in self.out.splitlines() if line.startswith('{"event": "summary"'))
        return [*self.made, *(ElfError(**each["error"]) for each in summaries if "error" in each)]

    @property
    def lines(self) -> list[str]:
        """What was logged, without the time."""
        return [line.partition(" - ")[2] for line in self.err.splitlines()]

    @property
    def received(self) -> list[tuple[str, str]]:
        """The topic and payload of each message that `subscribe` logged."""
        found = (re.fullmatch(r"Received message: (.*) from topic: (\S+) by \S+", line) for line in self.lines)
        return [(match[2], match[1]) for match in found if match]


class Running:
    """A command in a window of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.out = ""  # once it has ended, the standard output
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_output)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            with self._news:
                self._lines.append(line)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _read_output(self) -> None:
        if self.process.stdout:
            with self.process.stdout:
                self.out = self.process.stdout.read()

    def await_line(self, pattern: str) -> str:
        """Wait until a line of the standard error matches."""

        def found() -> str | None:
            return next((line for line in self._lines if re.search(pattern, line)), None)

        with self._news:
            self._news.wait_for(lambda: found() or self._ended, PATIENCE_S)
            line = found()
        assert line, f"no line like {pattern!r} in:\n{''.join(self._lines)}"
        return line

    def count(self, text: str) -> int:
        """Count the lines of the standard error that have come and contain a text."""
        with self._news:
            return sum(text in line for line in self._lines)

    def last_line(self, text: str) -> str:
        """The last of these lines that contains a text."""
        with self._news:
            return next(line for line in reversed(self._lines) if text in line)

    def await_count(self, text: str, number: int) -> None:
        """Wait until that many lines contain a text."""
        with self._news:
            assert self._news.wait_for(lambda: sum(text in line for line in self._lines) >= number, PATIENCE_S)

    def signal(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def end(self, status: int = 0) -> Result:
        """Wait until it ends, with `status`."""
        self.process.wait(PATIENCE_S)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        result = Result(self.process.returncode, self.out, "".join(self._lines))
        assert result.status == status, f"exit status {result.status}, not {status}:\n{result.err}"
        return result

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join()
        assert self.process.stderr
        self.process.stderr.close()


def pipe_with(content: bytes) -> int:
    """A pipe to read from, which has the beginning of the content already; the rest follows."""
    reading, writing = os.pipe()
    left = content[os.write(writing, content[:PIPE_BYTES]) if content else 0 :]

    def write_rest() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb") as pipe:
            pipe.write(left)

    threading.Thread(target=write_rest, daemon=True).start()
    return reading


class Elf:
    """A user of elf.py: a shell in some directory, an environment, and a misc/ that nobody else uses."""

    def __init__(self, directory: Path, environment: Mapping[str, str], service: AwsService | None = None) -> None:
        self.script = ELF
        self.python = sys.executable
        self.misc = directory / "misc"
        self.home = directory / "home"
        self.cwd = directory / "elsewhere"
        for each in (self.home, self.cwd):
            each.mkdir(exist_ok=True)
        self.environment = clean_environment(self.home) | {"ELF_MISC_DIR": str(self.misc)} | dict(environment)
        self.to_broker: tuple[str, ...] = ()
        if service:
            self.to_broker = (
                "--mqtt-endpoint",
                f"localhost:{service.mqtt_port}",
                "--root-cert",
                str(service.root_cert),
            )
        self._running: list[Running] = []

    def _command(self, args: tuple[object, ...], environment: Mapping[str, str]) -> dict[str, Any]:
        return {
            "args": [self.python, str(self.script), *map(str, args)],
            "cwd": self.cwd,
            "env": {**self.environment, **environment},
            "stdin": subprocess.DEVNULL,
            "text": True,
            "encoding": "utf-8",
            "errors": "surrogateescape",
        }

    def __call__(
        self,
        *args: object,
        status: int | None = 0,
        env: Mapping[str, str] | None = None,
        umask: int = -1,
        feed: bytes | None = None,
    ) -> Result:
        """Run a command, with `feed` as its standard input, and make sure of its exit status; None takes any."""
        command = self._command(args, env or {})
        if feed is not None:
            command["stdin"] = pipe_with(feed)
        with forking.popen(**command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, umask=umask) as process:
            if feed is not None:
                os.close(command["stdin"])
            try:
                out, err = process.communicate(timeout=PATIENCE_S * 2)
            except BaseException:
                process.kill()
                raise
        result = Result(process.returncode, out, err)
        if status is not None:
            assert result.status == status, f"exit status {result.status}, not {status}:\n{result.out}{result.err}"
        return result

    def popen(self, *args: object, **settings: Any) -> subprocess.Popen[Any]:
        """Start a command whose streams are the caller's; `settings` are subprocess.Popen()'s, `env` what is added."""
        command = self._command(args, settings.pop("env", None) or {})
        return forking.popen(**{**command, **settings})

    def start(self, *args: object, env: Mapping[str, str] | None = None, **settings: Any) -> Running:
        """Run a command in another window, a process group of its own; `settings` are subprocess.Popen()'s."""
        kept = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
        running = Running(self.popen(*args, env=env, **{**kept, **settings}))
        self._running.append(running)
        return running

    def subscribe(self, *args: object) -> Running:
        """Run `subscribe` in another window, and wait until every thing has subscribed."""
        running = self.start("subscribe", *self.to_broker, "--duration", "30", *args)
        running.await_line("ELF listening on")
        return running

    def in_shell(
        self,
        script: str,
        status: int = 0,
        env: Mapping[str, str] | None = None,
        shell: Sequence[str] = ("bash", "-o", "pipefail"),
    ) -> Result:
        """Run a script to its end, in which $ELF is ELF and $BROKER its options."""
        command = self._command((), {**self._in_scripts, **(env or {})})
        command["args"] = [*shell, "-c", script]
        done = subprocess.run(**command, capture_output=True, timeout=PATIENCE_S * 2, check=False)
        assert done.returncode == status, f"exit status {done.returncode}:\n{done.stdout}{done.stderr}"
        return Result(done.returncode, done.stdout, done.stderr)

    @property
    def typed(self) -> str:
        """How a command that ELF names begins, as this user typed the last one."""
        return f"{self.python} {self.script}"

    @property
    def _in_scripts(self) -> dict[str, str]:
        return {"ELF": self.typed, "BROKER": " ".join(self.to_broker)}

    def in_terminal(
        self,
        *args: object,
        columns: int = 120,
        env: Mapping[str, str] | None = None,
        script: str = "",
        keys: Mapping[str, KeyPress] | None = None,
        rows: int = 24,
    ) -> Terminal:
        """Run a command to its end in a terminal of its own; or a shell's script with jobs, in which $ELF is ELF.

        When it has written what a pattern in `keys` matches, that one's are typed there. It is left as it was.
        """
        command = self._command(args, {"TERM": "xterm-256color", **(env or {})})
        if script:
            command["env"] |= self._in_scripts
            command["args"] = ["setsid", "--ctty", "--wait", "bash", "-mc", script]
        return run_in_terminal(lambda **streams: forking.popen(**{**command, **streams}), columns, keys, rows)

    def close_windows(self) -> None:
        for running in self._running:
            running.kill()

    def recorded(self) -> dict[str, dict[str, Any]]:
        """What things.json says of each thing."""
        path = self.misc / "things.json"
        entries = json.loads(path.read_text()) if path.exists() else []
        return {name: recorded for entry in entries for name, recorded in entry.items()}

    def elf_json(self) -> dict[str, Any]:
        return dict(json.loads((self.misc / "elf.json").read_text()))

    def files(self) -> list[str]:
        return sorted(path.name for path in self.misc.iterdir())


def assert_whole(elf: Elf, account: Account, count: int) -> None:
    """Ask AWS: each of `count` things has the certificate that ELF has the key of, and there is no other."""
    recorded = elf.recorded()
    assert account.things() == sorted(recorded) == sorted(f"thing_{number}" for number in range(count))
    assert account.certificates() == {recorded[name]["certificateId"]: "ACTIVE" for name in recorded}
    assert all(account.certificate_of(name) == recorded[name]["certificateId"] for name in recorded)
    assert all("elf_stage" not in thing for thing in recorded.values())
    for name in recorded:
        for suffix in ("pem", "pub", "prv"):
            assert (elf.misc / f"{name}.{suffix}").read_text().startswith("-----BEGIN"), (name, suffix)
    assert not (elf.misc / "things.journal").exists()


class Pair(Elf):
    """A fleet of two things, and the account they are in."""

    account: Account


class InProcess:
    """elf.py as a program that imports it sees it: main(argv) returns the exit status. Quicker than a process."""

    def __init__(self, module: ModuleType, elf: Elf, monkeypatch: Any, capsys: Any) -> None:
        self.module = module
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        for key in list(os.environ):
            if key.startswith("AWS_"):
                monkeypatch.delenv(key)
        self.use(elf.environment)
        self._failures: list[ElfError] = []
        make = ElfError.__init__

        def note(failure: ElfError, *args: Any, **kwargs: Any) -> None:
            make(failure, *args, **kwargs)
            self._failures.append(failure)

        monkeypatch.setattr(ElfError, "__init__", note)
        monkeypatch.setattr(text, "typed_as", dict(text.typed_as))

    def use(self, environment: Mapping[str, str]) -> None:
        for key, value in environment.items():
            self._monkeypatch.setenv(key, value)

    def forget(self, *names: str) -> None:
        for name in names:
            self._monkeypatch.delenv(name)

    def __call__(self, *args: object, status: int | None = 0) -> Result:
        """Run a command, and make sure of its exit status; None takes any."""
        self._capsys.readouterr()
        self._failures.clear()
        result = Result(self.module.main([str(arg) for arg in args]), *self._capsys.readouterr(), [*self._failures])
        is_right = status in (None, result.status)
        assert is_right, f"exit status {result.status}, not {status}:\n{result.out}{result.err}"
        return result
