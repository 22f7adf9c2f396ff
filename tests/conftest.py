"""Every test has an AWS account and a misc/ of its own. One MiniStack, which ELF did not start, holds all accounts."""

from __future__ import annotations

import functools
import gc
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.aws import ANYTHING, Account, AwsService, aws_service
from support.botocore_once import work_once
from support.failures import SEEN, UNSEEN, Explained, assert_explained, failure_names
from support.http_proxy import HttpProxy
from support.machine import WITNESS, kill_servers_of
from support.mqtt import END, Client
from support.networks import Relay
from support.program import Limits, set_limits
from support.shell import Elf, InProcess, Pair

UNSEEN_FAILURES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="run whole matrices of calls, errors and kills, not samples")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:ssl.PROTOCOL_TLS is deprecated:DeprecationWarning")  # the SDK's


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended."""
    SEEN.update(getattr(node, "workeroutput", {}).get("failures", ()))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """After a run of all tests that has succeeded: let it fail if a failure of ELF's was seen in none."""
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["failures"] = sorted(SEEN)
        return
    options = vars(config.option)
    is_part = any(options.get(name) for name in ("keyword", "markexpr", "lf", "deselect", "ignore", "collectonly"))
    if os.name == "posix" and not exitstatus and not is_part and config.args == config.getini("testpaths"):
        config.stash[UNSEEN_FAILURES] = sorted(failure_names() - SEEN - UNSEEN.keys())
        if config.stash[UNSEEN_FAILURES]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_finish() -> None:
    """Look for garbage in what the tests make, and seldom: a quarter of a worker's time went into looking."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for name in config.stash.get(UNSEEN_FAILURES, ()):
        terminalreporter.write_line(f"no test provokes this failure, or looks at its name: {name}", red=True)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Cut what is long in a test's name, which is also in the environment of what the test starts."""
    is_long = isinstance(val, str | bytes) and len(val) > 80
    return f"{val[:40]}... ({len(val):,})" if is_long else None


@pytest.fixture
def explained() -> Explained:
    """Make sure that a failure of some name was explained, with these facts."""
    return assert_explained


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a sample leaves out; start groups and what takes long first: each has one worker to itself."""
    seen: Counter[str] = Counter()

    def is_in_sample(item: pytest.Item) -> bool:
        mark, function = item.get_closest_marker("sample"), item.nodeid.partition("[")[0]
        seen[function] += 1
        is_asked_for = config.getoption("matrix") or any("::" in arg for arg in config.args)
        return not mark or is_asked_for or seen[function] % mark.args[0] == 1

    samples = {item: is_in_sample(item) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not samples[item]])

    def is_short(item: pytest.Item) -> bool:
        return not any(map(item.get_closest_marker, ("xdist_group", "long")))

    items[:] = sorted(filter(samples.get, items), key=is_short)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AwsService]:
    """The AWS that ELF did not start."""
    with aws_service(tmp_path_factory.mktemp("ministack")) as running:
        yield running


@pytest.fixture
def account(service: AwsService) -> Account:
    return Account(service)


@pytest.fixture
def elf(account: Account, service: AwsService, tmp_path: Path) -> Iterator[Elf]:
    """A user with credentials of `account`, and no things yet."""
    fleet = Elf(tmp_path, account.credentials | {"AWS_ENDPOINT_URL": service.url}, service)
    yield fleet
    fleet.close_windows()


@pytest.fixture(scope="session")
def _pair(service: AwsService, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    account = Account(service)
    environment = account.credentials | {"AWS_ENDPOINT_URL": service.url}
    fleet = Pair(tmp_path_factory.mktemp("pair"), environment, service)
    fleet.account = account
    fleet("create", 2)
    fleet("send", *fleet.to_broker, "--duration", "0.01")
    return fleet


@pytest.fixture
def pair(_pair: Pair) -> Iterator[Pair]:
    """A fleet of two things that have sent already, shared by the tests that leave it as it is."""
    before = _pair.recorded()
    yield _pair
    _pair.close_windows()
    assert _pair.recorded() == before


@pytest.fixture
def connect(service: AwsService, tmp_path: Path) -> Iterator[Callable[[Account], Client]]:
    """Make an MQTT client in an account, with a certificate that may do anything, and connect it."""
    clients: list[Client] = []

    def connect(account: Account) -> Client:
        number = len(clients)
        keys = account.iot.create_keys_and_certificate(setAsActive=True)
        if "anything" not in account.policies():
            account.iot.create_policy(policyName="anything", policyDocument=json.dumps(ANYTHING))
        account.iot.attach_policy(policyName="anything", target=keys["certificateArn"])
        certificate, key = tmp_path / f"client-{number}.pem", tmp_path / f"client-{number}.prv"
        certificate.write_text(keys["certificatePem"])
        key.write_text(keys["keyPair"]["PrivateKey"])
        client = Client(service, certificate, key, f"not-elf-{keys['certificateId'][:8]}")
        clients.append(client)
        assert client.connect() == "Success"
        client.subscribe(END)
        return client

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def ear(pair: Pair, connect: Callable[[Account], Client]) -> Client:
    """An MQTT client in the account of `pair` that hears all but the topics that begin with $."""
    client = connect(pair.account)
    client.subscribe("#")
    return client


@pytest.fixture
def relay(service: AwsService) -> Iterator[Relay]:
    """A network between the things and the broker."""
    relay = Relay(service.mqtt_port)
    yield relay
    relay.close()


@pytest.fixture(scope="session")
def module() -> Iterator[ModuleType]:
    """elf.py, imported."""
    import elf

    with pytest.MonkeyPatch.context() as patch:
        work_once(patch.setattr)
        yield elf


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """Change constants of the program until the test ends, each in the one module that assigns it."""
    return functools.partial(set_limits, monkeypatch.setattr)


@pytest.fixture
def main(
    module: ModuleType, elf: Elf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> InProcess:
    """elf.main(), as `elf` the user would call it, but for the pause before it believes that something is gone."""
    set_limits(monkeypatch.setattr, ABSENCE_S=0.2)
    return InProcess(module, elf, monkeypatch, capsys)


@pytest.fixture
def proxy(service: AwsService, elf: Elf, main: InProcess) -> Iterator[HttpProxy]:
    """What sits between AWS and both `elf` and `main`: it can delay, throttle and break their calls."""
    proxy = HttpProxy(service.url)
    elf.environment["AWS_ENDPOINT_URL"] = proxy.url
    main.use({"AWS_ENDPOINT_URL": proxy.url})
    yield proxy
    proxy.close()


@pytest.fixture
def main_of_pair(
    module: ModuleType, pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> InProcess:
    """elf.main(), for the things of `pair`."""
    return InProcess(module, pair, monkeypatch, capsys)


@pytest.fixture
def witness(elf: Elf, tmp_path: Path) -> Callable[[str], list[str]]:
    """From now on see what `elf` connects to and leaves open to others; the function returns lines of one kind."""
    log = tmp_path / "witness.log"
    log.touch()
    elf.environment |= {"PYTHONPATH": str(WITNESS), "WITNESS_LOG": str(log), "WITNESS_DIRECTORY": str(elf.misc)}

    def seen(kind: str) -> list[str]:
        lines = log.read_text().splitlines()
        return [line.removeprefix(f"{kind} ") for line in lines if line.startswith(f"{kind} ")]

    return seen


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Elf]:
    """A user whose AWS configuration and proxy are broken; no embedded AWS IoT stays behind."""
    nowhere = "http://127.0.0.1:9"
    environment = {"AWS_PROFILE": "no-such-profile", "AWS_ENDPOINT_URL": nowhere, "HTTP_PROXY": nowhere}
    fleet = Elf(tmp_path, environment | dict.fromkeys(("http_proxy", "HTTPS_PROXY", "ALL_PROXY"), nowhere))
    (fleet.home / ".aws").mkdir()
    (fleet.home / ".aws" / "config").write_text("this is not what a configuration looks like\n")
    yield fleet
    fleet.close_windows()
    kill_servers_of(fleet)
