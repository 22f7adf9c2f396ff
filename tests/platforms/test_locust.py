"""Locust drives the fleet: on several workers that come, go and die, over a bad network, and from its page."""

from __future__ import annotations

import base64
import contextlib
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from support import forking
from support.aws import Account, AwsService
from support.http_proxy import HttpProxy, aws_error
from support.machine import PATIENCE_S, await_end, await_listener, free_port
from support.mqtt import Client, Heard
from support.networks import Relay
from support.program import ROOT, code_with_limits
from support.shell import Elf, Running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
THINGS = 60
TOKEN = "TOKENthatIsASecret0123456789+/="
# Locust has one of its own at times: it closes a CSV file that it still writes.
OUR_TRACEBACK = re.compile(
    rf'File "{re.escape(str(ROOT))}/(elf|locustfile|iot_elf)'
)  # a virtual environment may be there as well
PASSWORD = "correct horse battery staple"
SLOW = f"{code_with_limits(CONNECTS_PER_S=4)}import locustfile; locustfile.TELL_S = 1.0\nfrom locustfile import *\n"


class Locusts:
    """A user of Locust: its windows, on a fleet and its broker."""

    def __init__(self, elf: Elf, service: AwsService) -> None:
        self.elf = elf
        self.file = ROOT / "locustfile.py"
        self.report = elf.cwd / "report"
        self.to_broker: tuple[object, ...] = ("--host", f"localhost:{service.mqtt_port}")
        reports = ("--csv", self.report, "--html", f"{self.report}.html", "--json-file", self.report)
        self.options = ("--root-cert", service.root_cert, *reports)
        self.web_port = free_port()
        self.windows: list[Running] = []
        self._port = free_port()

    def start(self, *args: object, **environment: str) -> Running:
        process = forking.popen(
            args=[sys.executable, "-m", "locust", "-f", str(self.file), *map(str, args)],
            cwd=self.elf.cwd,
            env={**self.elf.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.windows.append(Running(process))
        return self.windows[-1]

    def headless(self, *args: object) -> Running:
        return self.start("--headless", *self.to_broker, *self.options, *args)

    def master(self, workers: int, *args: object) -> Running:
        port = ("--master-bind-host", "127.0.0.1", "--master-bind-port", self._port)
        return self.headless("--master", *port, "--expect-workers", workers, *args)

    def worker(self, *args: object, **environment: str) -> Running:
        """A worker, which has no credentials."""
        nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
        where = ("--master-host", "127.0.0.1", "--master-port", self._port)
        return self.start("--worker", *where, *args, **nobody, **environment)

    def page(self, *args: object, **environment: str) -> Running:
        where = ("--web-host", "127.0.0.1", "--web-port", self.web_port)
        window = self.start(*where, *self.to_broker, *self.options, *args, **environment)
        await_listener(self.web_port)
        return window

    def ask(self, path: str, form: bytes | None = None) -> Any:
        """What Locust's page asks, or posts, and is answered."""
        own = f"http://127.0.0.1:{self.web_port}/"
        page_asks = urllib.request.Request(own + path, form, {"Referer": own})
        with urllib.request.urlopen(page_asks, timeout=PATIENCE_S) as answer:
            return json.load(answer)

    def swarm(self, **form: object) -> Any:
        """What the button on the page does that starts a run, or changes one."""
        return self.ask("swarm", urllib.parse.urlencode(form).encode())

    def stop(self) -> None:
        try:
            self.ask("stop", b"")
        except urllib.error.HTTPError:  # Locust before 2.47
            self.ask("stop")

    def await_requests(self, kind: str, number: int) -> None:
        """Wait until Locust has counted so many of a type."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            stats = self.ask("stats/requests")["stats"]
            if sum(row["num_requests"] for row in stats if row["method"] == kind) >= number:
                return
            time.sleep(0.1)  # Locust tells of it when asked, alone
        raise AssertionError(f"there are no {number} requests of type {kind}: {stats}")

    def counts(self) -> dict[str, tuple[int, int]]:
        """Requests and failures of each type, as Locust has them in the end."""
        rows = json.loads(self.report.with_suffix(".json").read_text())
        return {row["method"]: (row["num_requests"], row["num_failures"]) for row in rows}

    def failures(self) -> str:
        return Path(f"{self.report}_failures.csv").read_text()


@pytest.fixture
def locusts(elf: Elf, service: AwsService) -> Iterator[Locusts]:
    users = Locusts(elf, service)
    yield users
    for window in users.windows:
        with contextlib.suppress(ValueError):  # it has ended, and its files are closed
            window.kill()


@pytest.fixture
def ear(account: Account, connect: Callable[[Account], Client]) -> Client:
    """An MQTT client in the account that hears what the things publish."""
    client = connect(account)
    client.subscribe("elf/#")
    return client


def hear_from(ear: Client, things: int) -> list[Heard]:
    """Listen until so many things have been heard."""
    heard: list[Heard] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(topics := {message.topic for message in heard}) < things:
        assert time.monotonic() < deadline, f"of {things} things only {topics} are heard"
        heard.append(ear.hear())
    return heard


def assert_one_at_a_time(heard: list[Heard], interval_s: float) -> None:
    """No thing has spoken more often than one user of it does."""
    times = [float(json.loads(message.payload)["ts"]) for message in heard]
    most = (max(times) - min(times)) / interval_s + 2
    assert max(Counter(message.topic for message in heard).values()) <= most


@pytest.mark.long
def test_two_workers_share_the_fleet_and_every_message_is_accounted_for(
    locusts: Locusts, account: Account, ear: Client
) -> None:
    locusts.elf("create", THINGS)
    workers = [locusts.worker(), locusts.worker()]
    master = locusts.master(2, "--run-time", "6s", "--subscribers", 0.05)
    master.end()
    for worker in workers:
        worker.end()
    counts, heard = locusts.counts(), ear.hear_all()
    listeners = {"thing_0", "thing_20", "thing_40"}
    assert {message.topic for message in heard} == {f"elf/{name}" for name in {*locusts.elf.recorded()} - listeners}
    assert_one_at_a_time(heard, interval_s=1.0)
    assert counts["CONNECT"] == (THINGS, 0)
    assert counts["PUBLISH"] == (len(heard), 0)
    assert counts["RECEIVE"][0] > len(heard) and counts["RECEIVE"][1] == 0
    assert counts.keys() == {"CONNECT", "PUBLISH", "RECEIVE"}
    with Path(f"{locusts.report}_stats.csv").open(newline="") as file:
        requests = {row["Name"]: int(row["Request Count"]) for row in csv.DictReader(file)}
    load = "(QoS 1, every 1 s, 5% subscribe)"
    assert requests[f"elf/{{thing_name}} {load}"] == len(heard)
    assert requests[f"elf/+ {load}"] == counts["RECEIVE"][0]
    assert requests["Aggregated"] == len(heard) + counts["RECEIVE"][0]  # without the connects
    assert all(account.policies_of(name) == [f"policy-{name}"] for name in locusts.elf.recorded())


@pytest.mark.long
def test_a_worker_is_killed_and_the_others_go_on(locusts: Locusts, ear: Client) -> None:
    locusts.elf("create", 7)
    victim, survivor = locusts.worker(), locusts.worker()
    master = locusts.master(2, "--interval", "0.2")
    hear_from(ear, 7)
    victim.process.kill()
    line = master.await_line("is gone with [34] things")
    gone = int(re.findall(r"with ([34]) things", line)[0])
    ear.hear_all()
    assert len({ear.hear().topic for _ in range(100)}) == 7 - gone
    master.process.terminate()
    result = master.end(status=1)
    survivor.end()
    assert not OUR_TRACEBACK.search(result.err)
    assert locusts.counts()["WORKER"] == (1, 1)
    assert "is gone with" in locusts.report.with_suffix(".html").read_text()


@pytest.mark.long
def test_a_worker_that_joins_has_things_of_the_others(locusts: Locusts, relay: Relay, ear: Client) -> None:
    locusts.elf("create", 6)
    locusts.to_broker = ("--host", f"localhost:{relay.port}")
    workers = [locusts.worker()]
    master = locusts.master(1, "--interval", "0.2")
    heard = hear_from(ear, 6)
    workers.append(locusts.worker())
    master.await_line("6 users .* to 2 ready workers")
    assert_moved(locusts, relay, ear, master, workers, heard)


@pytest.mark.long
def test_the_others_have_the_things_of_a_worker_that_leaves(locusts: Locusts, relay: Relay, ear: Client) -> None:
    locusts.elf("create", 6)
    locusts.to_broker = ("--host", f"localhost:{relay.port}")
    leaver, stayer = locusts.worker(), locusts.worker()
    master = locusts.master(2, "--interval", "0.2")
    heard = hear_from(ear, 6)
    leaver.process.terminate()
    master.await_line("6 users .* to 1 ready workers")
    leaver.end()
    assert_moved(locusts, relay, ear, master, [stayer], heard)


def assert_moved(
    locusts: Locusts, relay: Relay, ear: Client, master: Running, workers: list[Running], heard: list[Heard]
) -> None:
    """Half of six things have connected once more, elsewhere; all go on, and none has been in two places."""
    relay.await_arrivals(6 + 3)
    heard += ear.hear_all() + hear_from(ear, 6)
    master.process.terminate()
    master.end()
    for worker in workers:
        worker.end()
    assert_one_at_a_time(heard + ear.hear_all(), interval_s=0.2)
    assert locusts.counts().keys() == {"CONNECT", "PUBLISH"}
    assert locusts.counts()["CONNECT"] == (6 + 3, 0)


@pytest.mark.long
def test_all_workers_together_connect_at_one_pace(locusts: Locusts, relay: Relay) -> None:
    locusts.elf("create", 20)
    locusts.file = locusts.elf.cwd / "slow.py"
    locusts.file.write_text(SLOW)
    locusts.to_broker = ("--host", f"localhost:{relay.port}")
    workers = [locusts.worker(), locusts.worker()]
    result = locusts.master(2, "--run-time", "1s").end()
    for worker in workers:
        worker.end()
    assert len(relay.arrivals) == 20
    told = [
        line.partition("iot-elf: ")[2]
        for line in result.err.splitlines()
        if "things connected" in line or "so far" in line
    ]
    assert len(told) >= 3 and told[0].startswith("connecting: ") and told[-1] == "20 of 20 things connected"
    assert "Run time limit set to 1 seconds, from when all things are connected" in result.err
    assert locusts.counts()["CONNECT"] == (20, 0)
    assert relay.arrivals[-1] - relay.arrivals[0] > 3.5  # at 4 a second 4.75 s, at 4 a second and worker 2.25 s


def test_a_run_that_ends_before_its_things_are_connected_has_failed(locusts: Locusts) -> None:
    locusts.elf("create", 8)
    locusts.file = locusts.elf.cwd / "slow.py"
    locusts.file.write_text(SLOW)
    window = locusts.headless("--run-time", "1s")
    window.await_line("connecting: [1-7] of 8 things so far")
    window.process.terminate()
    err = window.end(status=1).err
    (ends,) = re.findall("the run ends with ([1-7]) of 8 things connected", err)
    requests, failures = locusts.counts()["CONNECT"]
    assert requests == 8 and failures == 8 - int(ends)


def test_an_outage_is_counted_and_no_message_lost(locusts: Locusts, relay: Relay, ear: Client) -> None:
    locusts.elf("create", 3)
    locusts.to_broker = ("--host", f"localhost:{relay.port}")
    window = locusts.page()
    assert locusts.swarm(user_count=3, spawn_rate=3, interval="0.1", run_time="1h")["success"]
    hear_from(ear, 3)
    relay.down()
    locusts.await_requests("DISCONNECT", 3)
    relay.up()
    locusts.await_requests("RECONNECT", 3)
    locusts.stop()
    window.process.terminate()
    window.end(status=1)
    counts, heard = locusts.counts(), {message.payload for message in ear.hear_all()}
    assert counts["DISCONNECT"] == (3, 3)
    assert counts["RECONNECT"] == (3, 0)
    assert counts["PUBLISH"][1] == 0 and counts["PUBLISH"][0] >= len(heard)
    assert "lost its connection to" in locusts.failures()


def test_more_users_than_things_are_refused(locusts: Locusts) -> None:
    locusts.elf("create", 2)
    result = locusts.headless("--users", 3, "--run-time", "1s").end(status=1)
    assert "3 users requested, but only 2 things exist (one user per thing)" in result.err
    assert "what to do: request at most 2 users, or make more things: `python elf.py create 3`" in result.err
    assert not OUR_TRACEBACK.search(result.err)


def test_without_things_there_is_nothing_to_run(locusts: Locusts) -> None:
    result = locusts.headless("--run-time", "1s").end(status=1)
    assert "there are no things yet" in result.err
    assert "what to do: make some" in result.err


def test_the_fleet_is_chosen_by_options_that_a_command_of_its_own_shows(locusts: Locusts, tmp_path: Path) -> None:
    locusts.elf("create", 1)
    result = locusts.headless("--run-time", "1s", "--region", "eu-west-1").end(status=1)
    assert "--region eu-west-1 does not match: this fleet is in region us-west-2" in result.err
    assert "there are no things yet" in locusts.headless("--misc-dir", tmp_path / "other").end(status=1).err
    result = locusts.headless("--run-time", "1s", "--aws-profile", "nobody").end(status=1)
    assert "The config profile (nobody) could not be found" in result.err
    shown = subprocess.run([sys.executable, str(locusts.file)], capture_output=True, text=True, check=True).stdout
    assert all(f"  --{option} " in shown for option in ("topic", "subscribers", "misc-dir", "aws-profile"))


def test_a_fleet_on_the_embedded_aws_iot_is_driven_from_any_directory(local: Elf, service: AwsService) -> None:
    local("--local", "create", 2)
    users = Locusts(local, service)
    result = users.start("--headless", "--run-time", "2s", "--json-file", users.report).end()
    assert users.counts().keys() == {"CONNECT", "PUBLISH"}
    assert not OUR_TRACEBACK.search(result.err)


def test_a_secret_in_aws_answer_is_shown_nowhere(locusts: Locusts, service: AwsService) -> None:
    proxy = HttpProxy(service.url)
    locusts.elf.environment |= {"AWS_ENDPOINT_URL": proxy.url, "AWS_SESSION_TOKEN": TOKEN}
    locusts.elf("create", 1)
    error = aws_error(403, "AccessDeniedException", f"you said {TOKEN}, and may not")
    proxy.inject("CreatePolicy", error, onwards=True)
    window = locusts.page("-L", "DEBUG")
    answer = locusts.swarm(user_count=1, spawn_rate=1)
    log = json.dumps(locusts.ask("logs"))
    window.process.terminate()
    err = window.end().err
    assert "you said ***, and may not" in err and "you said ***, and may not" in log
    assert TOKEN not in err + log + answer["message"]
    proxy.close()


def test_a_failure_is_explained_as_aws_explains_it(locusts: Locusts, account: Account) -> None:
    locusts.elf("create", 2)
    locusts.elf("send", *locusts.elf.to_broker, "--count", 1)
    account.iot.update_certificate(certificateId=account.certificate_of("thing_1"), newStatus="INACTIVE")
    os.utime(locusts.elf.misc / "things.json", (1, 1))  # what is young would be tried again for a while
    worker = locusts.worker()
    result = locusts.master(1, "--run-time", "4s").end(status=1)
    worker.end()
    assert "thing_1 can't connect: its certificate is INACTIVE; what to do: `aws " in locusts.failures()
    assert locusts.counts()["CONNECT"] == (2, 1)
    assert not OUR_TRACEBACK.search(result.err)


def test_a_worker_that_lacks_the_files_says_so(locusts: Locusts) -> None:
    """Where they are is the business of each machine: the master's choice is for the master alone."""
    locusts.elf("create", 2)
    worker = locusts.worker("--misc-dir", locusts.elf.cwd / "nothing")
    locusts.master(1, "--run-time", "2s", "--misc-dir", locusts.elf.misc).end(status=1)
    worker.end()
    assert "has no things on this worker; what to do: copy misc/ there" in locusts.failures()
    assert locusts.counts() == {"CONNECT": (2, 2)}


def test_what_is_wrong_is_said_on_the_page(locusts: Locusts, account: Account, ear: Client) -> None:
    locusts.elf("create", 2)
    window = locusts.page()
    for wrong, said in (
        ({"interval": "0.001"}, "must be at least 0.01 seconds"),
        ({"qos": "2"}, "'2' is not 0 or 1"),
        ({"subscribers": "much"}, "must be a share from 0 to 1, not 'much'"),
        ({"topic": "elf/#"}, "+ and # are for topic filters, not for a topic to publish to"),
        ({"user_count": "3"}, "3 users requested, but only 2 things exist"),
        ({"interval": "nan", "user_count": "x"}, "must be at least 0.01 seconds"),  # or it would be there later
        ({"spawn_rate": "nan"}, "must be 0.01 to 10000 users per second, not 'nan'"),
        ({"run_time": "9" * 30}, "is more than a year"),
        ({"user_count": ""}, "'' is not a whole number"),
    ):
        answer = locusts.swarm(**{"user_count": 2, "spawn_rate": 2, **wrong})
        assert not answer["success"] and said in answer["message"] and "what to do: " in answer["message"], answer
    assert not account.policies_of("thing_0")
    for posted in (b"[]", json.dumps({"user_class_name": "Thing", "publish": None, "weight": 0}).encode()):
        with pytest.raises(urllib.error.HTTPError) as refused:
            locusts.ask("user", posted)
        assert refused.value.code == 403
    for _ in range(2):  # one run after the other
        assert locusts.swarm(user_count=1, spawn_rate=2, interval="0.2")["success"]
        hear_from(ear, 1)
        assert locusts.swarm(user_count=2, spawn_rate=2)["success"]
        hear_from(ear, 2)
        assert "3 users requested" in locusts.swarm(user_count=3, spawn_rate=2)["message"]
        assert locusts.swarm(user_count=2, spawn_rate=2, topic="elf/#")["success"]  # which a run does not change
        assert locusts.swarm(user_count=1, spawn_rate=2)["success"]
        locusts.stop()
        ear.hear_all()
    window.process.terminate()
    assert not OUR_TRACEBACK.search(window.end().err)


def test_each_worker_renders_the_messages_of_its_things(locusts: Locusts, ear: Client) -> None:
    locusts.elf("create", 2)
    worker = locusts.worker()
    template = ("--template", "--json-message", ROOT / "example-template.json")
    locusts.master(1, "--run-time", "2s", "--interval", 0.2, *template).end()
    worker.end()
    counts: dict[str, list[int]] = {}
    for message in ear.hear_all():
        said = json.loads(message.payload)
        assert message.topic == f"elf/{said['name']}"
        counts.setdefault(message.topic, []).append(said["count"])
    assert counts == {f"elf/thing_{n}": list(range(1, 1 + len(counts[f"elf/thing_{n}"]))) for n in (0, 1)}
    assert locusts.counts()["PUBLISH"] == (sum(map(len, counts.values())), 0)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--json-message", "-"), "workers share no standard input"),
        (("--json-message", "none.json"), "could not read the message file none.json"),
        (("--host", "a b"), "'a b' is not HOST"),
        (("--template",), "--template does nothing without --json-message"),
    ],
)
def test_files_and_hosts_are_checked_on_the_command_line(locusts: Locusts, option: tuple[str, str], said: str) -> None:
    locusts.elf("create", 1)
    assert said in locusts.headless("--run-time", "1s", *option).end(status=1).err


def test_the_page_sets_no_file_and_no_host(locusts: Locusts, ear: Client) -> None:
    """What is posted for them is as if it were not there: nothing is read, dialled or written that it names."""
    secret, trap = locusts.elf.cwd / "secret.json", Relay(free_port())
    secret.write_text('{"secret": 1}')
    locusts.elf("create", 1)
    window = locusts.page()
    wanted = {"json_message": secret, "host": f"localhost:{trap.port}", "root_cert": secret, "html_file": "evil.html"}
    answer = locusts.swarm(user_count=1, spawn_rate=1, topic="elf/mine", **wanted)
    assert answer["success"]
    assert str(trap.port) not in answer["host"]
    message = ear.hear()
    assert (message.topic, b"IoT ELF Hello" in message.payload) == ("elf/mine", True)
    window.process.terminate()
    window.end()
    assert trap.arrivals == []
    assert not (locusts.elf.cwd / "evil.html").exists()
    trap.close()


def test_the_page_asks_for_the_password(locusts: Locusts, ear: Client) -> None:
    locusts.elf("create", 1)
    locusts.start("--web-port", free_port(), *locusts.to_broker).await_line("anyone on the network can use this page")
    result = locusts.start("--web-login", "--web-port", locusts.web_port, *locusts.to_broker).end(status=1)
    assert "--web-login has no password to ask for" in result.err and "ELF_WEB_PASSWORD" in result.err
    window = locusts.page("--web-login", "-L", "DEBUG", ELF_WEB_PASSWORD=PASSWORD)
    own = f"http://127.0.0.1:{locusts.web_port}"
    form = urllib.parse.urlencode({"user_count": 1, "spawn_rate": 1}).encode()
    right = f"anybody:{PASSWORD}"
    for given, headers, status in (
        (None, {}, 401),
        ("anybody:wrong", {}, 401),
        ("anybody:", {}, 401),
        (right, {"Origin": "http://evil.example"}, 403),
        (right, {"Origin": own}, 200),
    ):
        if given:
            headers["Authorization"] = f"Basic {base64.b64encode(given.encode()).decode()}"
        for path, posted in (("stats/requests", None), ("logs", None), ("", None), ("swarm", form)):
            asked = urllib.request.Request(f"{own}/{path}", posted, headers)
            try:
                answer = urllib.request.urlopen(asked, timeout=PATIENCE_S)
            except urllib.error.HTTPError as error:
                answer = error
            assert answer.status == status, (given, headers, path)
            assert ("WWW-Authenticate" in answer.headers) == (status == 401)
            assert PASSWORD.encode() not in answer.read()
    ear.hear()
    window.process.terminate()
    assert PASSWORD not in window.end().err


OTHERS: tuple[dict[str, str], ...] = (
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Referer": "http://evil.example/page"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Host": "evil.example"},
    {"Host": "evil.example:8089", "Origin": "http://evil.example:8089", "Sec-Fetch-Site": "same-origin"},
)


def test_another_site_can_ask_the_page_nothing(locusts: Locusts, ear: Client) -> None:
    locusts.elf("create", 1)
    locusts.page()
    start = urllib.parse.urlencode({"user_count": 1, "spawn_rate": 1}).encode()
    own = f"http://127.0.0.1:{locusts.web_port}"
    for headers in OTHERS:
        paths = [("swarm", start), ("stop", b""), ("stop", None), ("stats/requests", None), ("logs", None)]
        if "Origin" in headers or "Host" in headers:  # to read it, and not just to lead there
            paths.append(("", None))
        for path, form in paths:
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(f"{own}/{path}", form, headers), timeout=PATIENCE_S)
            assert refused.value.code == 403, (headers, path)
    for path in ("stop", "stats/reset"):  # a site may have the browser send no name, with a GET
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{own}/{path}", timeout=PATIENCE_S)
        assert refused.value.code in (403, 405), path  # which is before Locust 2.47, and since
    assert locusts.ask("stats/requests")["state"] == "ready"
    link = urllib.request.Request(own, headers={"Sec-Fetch-Site": "cross-site", "Referer": "http://other.example/"})
    page = urllib.request.urlopen(link, timeout=PATIENCE_S)  # anybody may have a link to the page
    assert (page.status, page.headers["X-Frame-Options"]) == (200, "DENY")
    same = urllib.request.Request(f"{own}/swarm", start, {"Origin": own, "Sec-Fetch-Site": "same-origin"})
    assert json.load(urllib.request.urlopen(same, timeout=PATIENCE_S))["success"]
    ear.hear()


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_a_page_of_another_origin_starts_nothing(locusts: Locusts) -> None:
    from playwright.sync_api import sync_playwright

    locusts.elf("create", 1)
    locusts.page()
    swarm = f"http://127.0.0.1:{locusts.web_port}/swarm"
    html = (
        f'<form method="post" action="{swarm}"><input name="user_count" value="1"><input name="spawn_rate" value="1">'
        '<input name="json_message" value="/etc/hostname"></form>'
    )
    fetch = """([url]) => fetch(
        url, {method: 'POST', mode: 'no-cors', body: new URLSearchParams('user_count=1&spawn_rate=1')}
    ).catch(() => null)"""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.route("http://evil.example/", lambda route: route.fulfill(body=html, content_type="text/html"))
        page.goto("http://evil.example/")
        page.evaluate(fetch, [swarm])
        with page.expect_response(swarm) as answer:
            page.evaluate("document.forms[0].submit()")
        assert answer.value.status == 403
        browser.close()
    assert locusts.ask("stats/requests")["state"] == "ready"


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_the_page_in_a_browser(locusts: Locusts, ear: Client) -> None:
    from playwright.sync_api import expect, sync_playwright

    locusts.elf("create", 3)
    port = free_port()
    window = locusts.page("--processes", 2, "--master-bind-port", port, "--master-port", port)
    processes = psutil.Process(window.process.pid).children()
    assert len(processes) == 2
    window.await_line("2 workers connected")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(1000 * PATIENCE_S)
        page.goto(f"http://127.0.0.1:{locusts.web_port}")
        users = page.locator("input[name=userCount]")
        assert users.input_value() == "3"
        page.get_by_text("Custom parameters").click()
        page.locator("input[name=topic]").fill("elf/page/{thing_name}")
        users.fill("4")
        page.get_by_role("button", name="START").click()
        expect(page.get_by_text("4 users requested, but only 3 things exist")).to_be_visible()
        users.fill("3")
        page.get_by_role("button", name="START").click()
        expect(page.get_by_role("button", name="STOP")).to_be_visible()
        expect(page.get_by_text("elf/page/{thing_name}")).to_be_visible(timeout=1000 * PATIENCE_S)
        assert {message.topic for message in hear_from(ear, 3)} == {f"elf/page/thing_{number}" for number in range(3)}
        page.wait_for_function(
            "fetch('/stats/requests').then(r => r.json()).then(s => s.total_rps > 0 && s.fail_ratio === 0)"
        )
        page.get_by_role("button", name="STOP").click()
        expect(page.get_by_role("button", name="NEW")).to_be_visible()
        browser.close()
    window.process.terminate()
    window.end()
    for process in processes:
        await_end(process)
