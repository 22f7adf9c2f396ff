"""`--local`: the embedded AWS IoT is started, found, kept off the network, brought back and taken away."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from support.aws import AwsService
from support.embedded import address_of, boto3_client_of, things_in_embedded_aws
from support.machine import await_end, kill_servers_of, servers_of
from support.mqtt import Client
from support.networks import Relay
from support.shell import Elf

pytestmark = pytest.mark.xdist_group("local")  # they share a fleet

ONCE = ("--duration", "0.01")


def ports_of(process: psutil.Process) -> dict[int, str]:
    """The address of each listener of a process, by its port."""
    connections = [each for each in process.net_connections("all") if each.status == psutil.CONN_LISTEN]
    return {each.laddr.port: each.laddr.ip for each in connections}


@pytest.fixture(scope="module")
def _started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elf]:
    elf = Elf(tmp_path_factory.mktemp("local"), {})
    try:
        elf("--local", "create", 2, umask=0)
        yield elf
    finally:
        kill_servers_of(elf)


@pytest.fixture
def started(_started: Elf) -> Iterator[Elf]:
    """A fleet of two things on an embedded AWS IoT, shared by the tests that leave it as it is."""
    yield _started
    _started.close_windows()


def test_a_fleet_is_made_talks_and_goes_without_any_aws_account(local: Elf) -> None:
    local("--local", "create", 2)
    assert things_in_embedded_aws(local) == ["thing_0", "thing_1"]
    (server,) = servers_of(local)
    window = local.subscribe("--count", 4)
    local("send", *ONCE)
    assert {topic for topic, _ in window.end().received} == {"elf/thing_0", "elf/thing_1"}
    assert servers_of(local) == [server]
    local("clean", "--local")
    await_end(server)
    assert local.files() == ["elf.json"]


def test_the_whole_of_it_listens_on_loopback_only(started: Elf) -> None:
    (server,) = servers_of(started)
    address = json.loads((started.misc / "local" / "address.json").read_text())
    listeners = {port: ip for process in (server, *server.children(True)) for port, ip in ports_of(process).items()}
    assert {address["http"], address["mqtt"]} <= set(listeners)
    assert set(listeners.values()) <= {"127.0.0.1", "::1"}


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_its_files_are_its_owners_alone(started: Elf) -> None:
    exposed = [
        path
        for path in (started.misc, *started.misc.rglob("*"))
        if stat.S_IMODE(path.lstat().st_mode) & 0o077 and not path.is_socket()
    ]
    assert exposed == []


def test_it_enforces_policies_as_aws_does(started: Elf) -> None:
    started("send", *ONCE)
    address = json.loads((started.misc / "local" / "address.json").read_text())
    service = AwsService("", address["mqtt"], started.misc / "local" / "ca.pem")
    for client_id, accepted in (("thing_0-x", True), ("thing_1-x", False)):
        client = Client(service, started.misc / "thing_0.pem", started.misc / "thing_0.prv", client_id)
        assert (client.connect() == "Success") is accepted
        client.close()


def test_a_shadow_can_be_updated(started: Elf) -> None:
    topic = "$aws/things/{thing_name}/shadow/update"
    started("send", *ONCE, '{"state": {"desired": {"colour": "green"}}}', "--topic", topic)
    shadow = json.loads(boto3_client_of(started, "iot-data").get_thing_shadow(thingName="thing_1")["payload"].read())
    assert shadow["state"]["desired"] == {"colour": "green"}


@pytest.mark.parametrize(
    ("options", "named"),
    [(("--endpoint-url", "http://127.0.0.1:9"), "--endpoint-url"), (("--profile", "p"), "--profile p")],
)
def test_options_of_an_account_contradict_it(started: Elf, options: tuple[str, ...], named: str) -> None:
    result = started("send", *options, status=1)
    assert named in result.err
    assert "the embedded AWS IoT" in result.err
    assert things_in_embedded_aws(started) == ["thing_0", "thing_1"]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_it_comes_back_with_its_state_after(local: Elf, signum: signal.Signals) -> None:
    local("--local", "create", 2)
    local("send", *ONCE)
    (server,) = servers_of(local)
    server.send_signal(signum)
    await_end(server)
    local("create", 3)
    (successor,) = servers_of(local)
    assert successor.pid != server.pid
    assert things_in_embedded_aws(local) == ["thing_0", "thing_1", "thing_2"]
    assert "3 acknowledged" in local("send", *ONCE).err
    local("clean")
    assert servers_of(local) == []


def test_it_ends_by_itself_when_misc_is_removed(local: Elf, tmp_path: Path) -> None:
    local("--local", "create")
    (server,) = servers_of(local)
    shutil.rmtree(local.misc.rename(tmp_path / "removed"))  # a server at work could write into it meanwhile
    await_end(server)
    assert not local.misc.exists()


def test_clean_only_local_stops_it_too(local: Elf) -> None:
    local("--local", "create")
    servers = servers_of(local)
    local("clean", "--only-local")
    for server in servers:
        await_end(server)
    assert local.files() == ["elf.json"]


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")
def test_it_does_not_mind_the_ctrl_c_that_stops_a_command(local: Elf) -> None:
    """Ctrl-C reaches every process that the terminal has in the foreground."""
    local("--local", "create")
    (server,) = servers_of(local)
    server.terminate()
    await_end(server)
    window = local.start("send", "--duration", "60")  # which starts it again, as a child of its own
    window.await_line("posting message")
    (server,) = servers_of(local)
    os.killpg(window.process.pid, signal.SIGINT)
    window.end(130)
    assert servers_of(local) == [server]
    assert things_in_embedded_aws(local) == ["thing_0"]


def test_two_creates_at_once_start_one(local: Elf) -> None:
    windows = [local.start("--local", "create", 2, "--wait", "30") for _ in range(2)]
    for window in windows:
        window.end()
    assert len(servers_of(local)) == 1
    assert things_in_embedded_aws(local) == ["thing_0", "thing_1"]
    assert len(boto3_client_of(local).list_certificates()["certificates"]) == 2


def test_no_credential_of_the_user_reaches_it(local: Elf, tmp_path: Path) -> None:
    local.environment |= {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": "mine-alone"}
    local("--local", "create", "--debug")
    (server,) = servers_of(local)
    environment = server.environ()
    assert not {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"} & set(environment)
    assert "mine-alone" not in environment.values()
    assert "AKIAIOSFODNN7EXAMPLE" not in (local.misc / "local" / "ministack.log").read_text(errors="replace")


def test_a_command_without_things_starts_nothing(local: Elf) -> None:
    local("--local", "send", status=1)
    local("--local", "clean")
    assert servers_of(local) == []
    assert not (local.misc / "local").exists()


def test_another_port_keeps_the_host_and_describe_endpoint_names_the_brokers_port(local: Elf) -> None:
    local("--local", "create")
    port = address_of(local)["mqtt"]
    answer = boto3_client_of(local).describe_endpoint(endpointType="iot:Data-ATS")
    assert answer["endpointAddress"].endswith(f":{port}")
    relay = Relay(port)
    try:
        sent = local("send", "--count", 1, "--mqtt-endpoint", f":{relay.port}").err
    finally:
        relay.close()
    assert "1 acknowledged, 0 lost" in sent
    assert relay.arrivals
