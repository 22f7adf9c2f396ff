"""The embedded AWS IoT does not start, is slow, dies, or may not save: ELF says so, and the next command goes on."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]
import pytest
from support.aws import AwsService
from support.embedded import address_of, things_in_embedded_aws
from support.failures import Explained
from support.machine import WITH_ONE_FREE_PORT, await_end, can_unshare, hamper, kill_servers_of, servers_of
from support.shell import Elf

needs_namespaces = pytest.mark.skipif(not can_unshare(), reason="this machine gives a user no namespaces")
ONCE = ("--duration", "0.01")


def test_too_many_open_files_do_not_end_the_embedded_aws(local: Elf) -> None:
    local("--local", "create")
    (server,) = servers_of(local)
    soft, hard = server.rlimit(psutil.RLIMIT_NOFILE)
    assert soft == hard  # it has raised what it may
    server.rlimit(psutil.RLIMIT_NOFILE, (server.num_fds() + 2, hard))
    flood = [socket.create_connection(("127.0.0.1", address_of(local)["http"])) for _ in range(20)]
    deadline = time.monotonic() + 3  # it looks five times a second whether it is to go on
    while time.monotonic() < deadline:
        assert server.is_running()
        with contextlib.suppress(psutil.TimeoutExpired):
            server.wait(0.2)
            raise AssertionError("it ended")
    server.rlimit(psutil.RLIMIT_NOFILE, (hard, hard))
    for connection in flood:
        connection.close()
    local("create", 2)
    assert servers_of(local) == [server]


def test_a_slow_embedded_aws_is_waited_for(local: Elf) -> None:
    local("--local", "create")
    (server,) = servers_of(local)
    server.suspend()
    window = local.start("create", 2)
    waker = threading.Timer(5, server.resume)
    waker.start()
    assert "starting the embedded AWS IoT" not in window.end().err
    waker.join()
    assert servers_of(local) == [server]
    assert things_in_embedded_aws(local) == ["thing_0", "thing_1"]


def test_ctrl_c_ends_the_wait_for_a_slow_embedded_aws(local: Elf) -> None:
    local("--local", "create")
    (server,) = servers_of(local)
    server.suspend()
    window = local.start("create", 2, "--verbose")
    with pytest.raises(subprocess.TimeoutExpired):
        window.process.wait(2)
    began = time.monotonic()
    window.signal(signal.SIGINT)
    window.end(130)
    assert time.monotonic() - began < 6
    server.resume()


def test_a_command_that_is_interrupted_leaves_the_embedded_aws_that_it_started_to_others(local: Elf) -> None:
    local("--local", "create")
    local("send", *ONCE)
    kill_servers_of(local)
    first = local.start("send", "--count", 1)
    first.await_line("starting the embedded AWS IoT")
    first.signal(signal.SIGINT)
    second = local.start("send", "--count", 1)
    first.end(130)
    assert "1 acknowledged, 0 lost" in second.end().err
    for server in servers_of(local):
        if server.pid != address_of(local)["pid"]:
            await_end(server)  # the second one that was started found that it is not needed
    assert len(servers_of(local)) == 1


def test_clean_ends_an_embedded_aws_that_has_just_been_started(local: Elf) -> None:
    window = local.start("--local", "create")
    window.await_line("starting the embedded AWS IoT")
    window.signal(signal.SIGINT)
    window.end(130)
    assert "does not stop" not in local("clean").err
    for server in servers_of(local):
        await_end(server)
    assert not (local.misc / "local").exists()


def test_an_embedded_aws_that_does_not_end_keeps_its_directory_and_is_the_only_one(local: Elf) -> None:
    local("--local", "create")
    (server,) = servers_of(local)
    server.suspend()
    said = local("clean", "--only-local").err
    assert f"WARNING - the embedded AWS IoT (`python -m iot_elf.local_aws {local.misc}/local`) does not stop" in said
    window = local.start("--local", "create", "--adopt", "--verbose")
    with pytest.raises(subprocess.TimeoutExpired):
        window.process.wait(2)
    assert servers_of(local) == [server]
    server.resume()  # it finds that its address is gone, and ends
    window.end()
    await_end(server)
    assert things_in_embedded_aws(local) == ["thing_0"]


def test_an_embedded_aws_that_may_not_save_its_state_says_so(local: Elf) -> None:
    local("--local", "create")
    (server,) = servers_of(local)
    window = local.start("subscribe", "--duration", 2)
    window.await_line("listening on")
    server.suspend()
    said = window.end().err
    server.resume()
    assert "WARNING - the embedded AWS IoT did not confirm that it saved its state" in said


def test_an_embedded_aws_that_does_not_start_is_explained(local: Elf, explained: Explained) -> None:
    (local.misc / "local" / "address.json").mkdir(parents=True)
    log = local.misc / "local" / "ministack.log"
    result = local("--local", "create", "--output", "json", status=1)
    explained(result, "LocalNotStarted", "IsADirectoryError", log)
    assert "Traceback" in log.read_text()


def test_an_embedded_aws_whose_ports_were_taken_takes_others(local: Elf, service: AwsService) -> None:
    local("--local", "create")
    (server,) = servers_of(local)
    server.kill()
    await_end(server)
    address = local.misc / "local" / "address.json"
    taken = {"http": urlsplit(service.url).port, "mqtt": service.mqtt_port}
    address.write_text(json.dumps(taken))  # as if another one had got the ports that it had
    local("create", 2)
    assert not set(taken.values()) & set(json.loads(address.read_text()).values())
    assert "2 acknowledged, 0 lost" in local("send", *ONCE).err


def test_an_embedded_aws_that_dies_in_mid_run_is_explained(local: Elf, explained: Explained) -> None:
    local("--local", "create")
    local("send", *ONCE)
    window = local.start("send", "--duration", "60", "--interval", "0.1", "--output", "json")
    window.await_line("posting message")
    (server,) = servers_of(local)
    server.kill()
    explained(window.end(1), "LocalStopped", local.misc / "local" / "ministack.log")
    local("send", *ONCE)


@needs_namespaces
def test_a_machine_without_a_free_port_is_explained(local: Elf, tmp_path: Path, explained: Explained) -> None:
    hamper(local, tmp_path, WITH_ONE_FREE_PORT)
    explained(local("--local", "create", "--output", "json", status=1), "LocalNotStarted", "free port on 127.0.0.1")
