# SPDX-License-Identifier: Apache-2.0
"""Locust drives ELF's fleet: every thing is a Locust user, on as many processes and machines as it takes.

The master, or the only process, is the desk. It gives the things their policies, and a thing to each user that starts,
on any worker, no faster than AWS takes connects; it gets the thing back when the user stops or its worker is gone.
Only the desk calls AWS: workers need the things' files, but no credentials.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - see elf.py
    sys.exit("locustfile.py needs Python 3.10 or later, and this is {}.{}".format(*sys.version_info))

import argparse
import collections
import contextlib
import functools
import hmac
import ipaddress
import itertools
import logging
import math
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
from flask import jsonify, request
from gevent.event import AsyncResult, Event
from gevent.lock import BoundedSemaphore
from gevent.queue import Queue
from gevent.selectors import GeventSelector
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.exception import StopUser
from locust.runners import STATE_INIT, STATE_RUNNING, STATE_SPAWNING, MasterRunner, WorkerRunner
from locust.util.timespan import parse_timespan
from werkzeug.datastructures import ImmutableMultiDict

import elf
from iot_elf import arguments, defaults, messages
from iot_elf.arguments import (
    broker_endpoint,
    directory_path,
    interval_s,
    number_between,
    place_part,
    positive_int,
    proxy_url,
)
from iot_elf.console import OutputWriter
from iot_elf.device import Device, DeviceListener, DeviceOptions
from iot_elf.errors import ElfError, Refusal, explained, log_failure
from iot_elf.events import EventQueue
from iot_elf.messages import Message
from iot_elf.metrics import about_clock, clocks_differ, object_in, time_of_sending
from iot_elf.mqtt import EventLoop
from iot_elf.network import Endpoint, raise_descriptor_limit
from iot_elf.text import detail_log, hide_environment, log, plural, printable, redacted

SETTLE_S = 10.0  # how long the end of a run waits for acknowledgements
SET_UP = Event()  # Locust can start users before set_up() is through
SPAWN_RATE = 100  # users a second, unless told otherwise; Locust warns of more
TELL_S = 5.0  # how often it is said how many things are connected, until all are
detail_log.addFilter(lambda record: record.levelno > logging.INFO)  # Locust's tables have the rest


def qos(text: str) -> int:
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or 1")
    return int(text)


# What is not given is as in elf.py. Locust sends the values to the workers: a path is a string, and one on each worker.
OPTIONS: tuple[tuple[str, Any, Callable[[str], Any], str], ...] = (
    ("topic", f"{defaults.TOPIC_ROOT}/{{thing_name}}", str, "where to publish; {thing_name} is the thing's name"),
    ("interval", defaults.INTERVAL_S, interval_s, "seconds between messages of a thing"),
    ("qos", 1, qos, "MQTT quality of service, 0 or 1"),
    (
        "subscribers",
        0.0,
        number_between("a share from 0 to 1", 0, 1),
        "share of the things, 0 to 1, that only subscribe",
    ),
    ("json-message", None, str, f"JSON object, or {messages.JSONL_SUFFIX} of many; every worker needs the file"),
    ("root-cert", None, str, "root certificates of the broker; every worker needs the file (default: Amazon's)"),
    (
        "proxy",
        None,
        proxy_url,
        f"use this proxy; {defaults.NO_PROXY}: use no proxy (default: from HTTPS_PROXY etc.)",
    ),
    ("region", None, functools.partial(place_part, key="region"), "AWS region (default: the fleet's)"),
    ("endpoint-url", None, functools.partial(place_part, key="endpoint_url"), "control plane (default: AWS's)"),
)
EDITABLE = {"topic", "interval", "qos", "subscribers", "user_count", "spawn_rate", "run_time"}  # on Locust's page
CHANGES = {"locust.swarm", "locust.stop", "locust.reset_stats"}  # what the page posts; /user would set any attribute


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: Any) -> None:
    for name, default, parse, help in OPTIONS:
        parser.add_argument(f"--{name}", default=default, type=parse, help=help, include_in_web_ui=name in EDITABLE)
    add = functools.partial(parser.add_argument, include_in_web_ui=False)
    add("--template", action="store_true", help="the file of --json-message is a Jinja2 template (docs/messages.md)")
    profile = "named profile of the AWS CLI (default: the fleet's, else none); --profile is Locust's own"
    add("--aws-profile", type=functools.partial(place_part, key="profile"), help=profile)
    where = "keys and state on this machine (default: $ELF_MISC_DIR, else misc/ next to elf.py)"
    add("--misc-dir", type=lambda text: str(directory_path(text)), help=where)


class Cli(elf.Cli):
    """The options of `elf.py send`, and those only for Locust."""

    topic: str
    subscribers: float


@contextlib.contextmanager
def opened_fleet(options: argparse.Namespace) -> Iterator[Cli]:
    """Hold the fleet until the block ends; yield Locust's options as `elf.py send` has them. Raises ElfError."""
    cli = elf.build_parser().parse_args(["send"], Cli())
    try:
        for name, _, parse, _ in OPTIONS:
            dest = name.replace("-", "_")
            if (value := getattr(options, dest)) is not None:
                setattr(cli, dest, parse(str(value)))  # Locust's page has not checked it
        cli.mqtt_endpoint = broker_endpoint(options.host) if options.host else None
    except argparse.ArgumentTypeError as error:
        raise ElfError("BadOption", str(error), "see `python locustfile.py`") from error
    cli.json_message, cli.root_cert = (Path(name) if name else None for name in (cli.json_message, cli.root_cert))
    cli.profile, cli.template, cli.events, cli.summary = options.aws_profile, options.template, EventQueue(), {}
    if cli.template and not cli.json_message:
        raise ElfError(
            "TemplateUseless",
            "--template does nothing without --json-message",
            "name a file, as example-template.json is",
        )
    cli.output_writer = OutputWriter(cli.events)
    with elf.held_fleet(cli, "locust", exclusive=False), elf.embedded_aws(cli, is_needed=True):
        yield cli


def admit(cli: Cli, users: int) -> dict[str, dict[str, Any]]:
    """Give the things their policies; return what the user of each has to know. Raises ElfError; botocore's errors."""
    if str(cli.json_message) == "-":
        raise ElfError("InputNotShared", "workers share no standard input", "name a file with --json-message")
    things, _, topics = elf.load_messages(cli)
    refuse_too_many(users, len(things))
    admitted, endpoint, patience_s = elf.prepare_devices(cli, things)
    refuse_too_many(users, len(admitted))
    heard = "/".join("+" if "{thing_name}" in level else level for level in cli.topic.split("/"))
    # Of the first things, 0 to all: how many of them listen.
    listeners = [math.ceil(number * cli.subscribers) for number in range(len(admitted) + 1)]
    return {
        thing.name: {
            "thing": thing.name,
            "endpoint": endpoint[:2],  # each worker finds its own way there
            "patience_s": patience_s[thing.name],
            "topic": topics[thing.name][0],
            "filters": [heard] if after > before else [],  # who listens does not publish
        }
        for thing, (before, after) in zip(admitted, itertools.pairwise(listeners), strict=True)
    }


def all_messages(cli: elf.Cli) -> list[Message]:
    """Return what each thing says, over and over. Raises ElfError, and the OSError of a file that can't be read."""
    if not cli.fleet.things:
        raise ElfError(
            "NoThings", f"{cli.misc_dir} has no things on this worker", "copy misc/ there, or name it with --misc-dir"
        )
    found = []
    for line in elf.load_messages(cli)[1]:
        if line.error:
            raise line.error
        found += [line.message] if line.message else []
    return found


def refuse_too_many(users: int, count: int) -> None:
    if users > count:
        raise ElfError(
            "TooFewThings",
            f"{users} users requested, but only {plural(count, 'thing')} exist (one user per thing)",
            f"request at most {count} users, or make more things: `elf.py create {users}`",
        )


def in_a_line(error: BaseException) -> str:
    failure = explained(error)
    return redacted(printable(failure.cause) + "; what to do: " + printable(failure.remedy))


def take_out_secrets(record: logging.LogRecord) -> bool:
    """Do for Locust's log, which its page shows as well, what LogFormatter does for ELF's."""
    record.msg, record.args = redacted(record.getMessage()), ()
    if record.exc_info:
        record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
    return True


def guard(web_ui: Any, options: argparse.Namespace) -> None:
    """Keep Locust's page from other sites and, with --web-login, from those who don't know the password."""
    names = {options.web_host.lower(), "localhost", socket.gethostname().lower(), socket.getfqdn().lower()}
    web_ui.app.before_request(functools.partial(refuse_others, names))
    web_ui.app.after_request(unframed)
    if web_ui.web_login:
        if not (password := os.environ.get("ELF_WEB_PASSWORD")):  # Locust would send an option to the workers
            log_failure(
                ElfError("PasswordMissing", "--web-login has no password to ask for", "set one in ELF_WEB_PASSWORD")
            )
            sys.exit(1)
        # Locust leaves the sessions behind its form to the locustfile; its pages still ask flask-login who the user is.
        web_ui.login_manager.request_loader(lambda _: None)
        web_ui.web_login = False
        web_ui.app.before_request(functools.partial(ask_password, password))
    elif options.web_host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("anyone on the network can use this page: add --web-login, or --web-host 127.0.0.1")


def ask_password(password: str) -> Any:
    """Let in who knows the password, under any user name (HTTP's Basic authentication, RFC 7617)."""
    given = (request.authorization and request.authorization.password) or ""
    if hmac.compare_digest(given.encode(), password.encode()):
        return None
    return "the password is wrong or missing", 401, {"WWW-Authenticate": 'Basic realm="ELF", charset="UTF-8"'}


def unframed(response: Any) -> Any:
    """Keep another site from showing the page inside its own, where a click on it would start a run."""
    response.headers["X-Frame-Options"] = "DENY"
    return response


def refuse_others(names: set[str]) -> Any:
    """Refuse what another site makes the user's browser ask; drop what even the page may not set.

    Files, hosts and all other options come only from the command line. A Host that is neither an address nor one of
    this machine's `names` belongs to a site whose name was pointed at this machine (DNS rebinding).
    """
    own = urlsplit(f"//{request.host}")
    is_known = own.hostname in names
    with contextlib.suppress(ValueError):
        is_known = bool(ipaddress.ip_address(own.hostname or "")) or is_known
    sites = [urlsplit(request.headers[name]).netloc for name in ("Origin", "Referer") if name in request.headers]
    is_own = request.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin") and set(sites) <= {own.netloc}
    is_link = request.endpoint == "locust.index" and "Origin" not in request.headers  # which any site may have
    # GET in Locust before 2.47, for which a browser may keep the other site's name to itself; the page's own it sends.
    is_change = request.method != "POST" and request.endpoint in ("locust.stop", "locust.reset_stats")
    is_nameless = not sites and "Sec-Fetch-Site" not in request.headers
    if not is_known or not (is_own or is_link) or (is_change and is_nameless):
        return "refused: not from this page, or under a name that is not this machine's (--web-host adds one)", 403
    if request.method not in ("GET", "HEAD", "OPTIONS") and request.endpoint not in CHANGES:
        return "refused: the page does not set this", 403
    request.form = ImmutableMultiDict((key, value) for key, value in request.form.items(multi=True) if key in EDITABLE)
    return None


def checked(form: dict[str, str]) -> tuple[int, int]:
    """Return how many users a form of the page asks for, and for how many seconds, 0 without end. Raises ElfError.

    What it sets stays with Locust for later runs, so all of it is checked, also where this run would not use it.
    """
    try:
        for name, _, parse, _ in OPTIONS:
            if name in form:
                parse(form[name])
        number_between("0.01 to 10000 users per second", 0.01, 10_000)(form.get("spawn_rate", ""))
        users, run_time = positive_int(form.get("user_count", "")), form.get("run_time", "")
        seconds = parse_timespan(run_time) if run_time else 0
        if not 0 <= seconds <= arguments.YEAR_S:
            raise ValueError(f"the run time {run_time!r} is more than a year")
    except (argparse.ArgumentTypeError, ValueError, OverflowError) as error:
        raise ElfError("BadOption", str(error), "see `python locustfile.py`, and `locust --help`") from error
    return users, seconds


class Run:
    """A run as one process sees it: with the fleet and the options of the run."""

    def __init__(self, environment: Any) -> None:
        self.environment, self.runner, self.options = environment, environment.runner, environment.parsed_options
        self.held = contextlib.ExitStack()
        environment.events.test_start.add_listener(self.open)
        environment.events.test_stop.add_listener(lambda **_: self.held.close())
        if getattr(self.runner, "worker_state", STATE_INIT) != STATE_INIT:  # it joined a run before it was set up
            self.open()

    def open(self, **_: object) -> None:
        self.failure: Exception | None = None  # why each user's connect fails, then
        try:
            self.cli = cli = self.held.enter_context(opened_fleet(self.options))
            # The desk as well: workers that can only read misc/ find the root certificates there.
            self.root_cert, self.messages = elf.root_certificate(cli), all_messages(cli)
            self.load = f"QoS {cli.qos}, every {cli.interval:g} s, {cli.subscribers:.0%} subscribe"
        except Exception as error:
            log_failure(error)
            self.failure = error

    def count(self, kind: str, name: object, took_s: float | None, size: int = 0, error: Any = None) -> None:
        """Have Locust count a request, which has no time if `took_s` is None, and which failed if there is an error."""
        self.environment.events.request.fire(
            request_type=kind,
            name=str(name),
            response_time=None if took_s is None else 1000 * took_s,
            response_length=size,
            exception=in_a_line(error) if error else None,
            context={},
        )

    def count_connect(self, kind: str, name: object, took_s: float) -> None:
        """Count a connect only in its own row: the totals and charts are of messages."""
        self.environment.stats.entries[(str(name), kind)].log(1000 * took_s, 0)


class Desk(Run):
    """What the master, or the only process, does for all users, wherever they are."""

    def __init__(self, environment: Any, web_ui: Any) -> None:
        super().__init__(environment)
        self.duties: dict[str, dict[str, Any]] = {}  # by thing
        self.free: Queue[str] = Queue()  # things that no user has
        self.worker_of: dict[str, str] = {}  # by thing that a user has
        self.gone: set[str] = set()  # workers that are heard of no more
        self.working: set[str] = set()  # workers that have not finished yet, at the end of a run
        self.turn = 0.0  # time.monotonic() of the last connect
        self.users = 0  # that the run has, or will have
        self.joined: set[str] = set()  # things that have connected in this run
        self.settled: set[str] = set()  # these, and those that failed, or are refused, and may take minutes
        self.run_time, self.timer = 0, gevent.Greenlet()  # seconds, 0 without end; and what counts them
        self.asking = BoundedSemaphore(defaults.DIAGNOSES_AT_ONCE)
        self.start, self.runner.start = self.runner.start, self.start_if_possible
        for message, listener in (("take", self.hand_out), ("give", self.take_back), ("refused", self.find_cause)):
            self.runner.register_message(f"elf-{message}", listener, concurrent=True)
        self.runner.register_message("elf-settled", self.settle)
        environment.events.test_stopping.add_listener(self.stop_timer)
        environment.events.test_stop.add_listener(self.count_unconnected)
        environment.events.quitting.add_listener(self.stop)  # before Locust finds its exit status
        if isinstance(self.runner, MasterRunner):
            self.runner.register_message("elf-finished", lambda msg, **_: self.working.discard(msg.node_id))
            environment.events.test_stopping.add_listener(self.await_workers)
            gevent.spawn(self.watch_workers)
        if web_ui:
            guard(web_ui, self.options)
            web_ui.app.before_request(self.refuse_on_page)
        try:
            with opened_fleet(self.options) as cli:
                things = len(elf.ready_things(cli.fleet))
                environment.host = str(cli.mqtt_endpoint or Endpoint(cli.place.data_endpoint or ""))
            self.options.num_users = self.options.num_users or things
            self.options.spawn_rate = self.options.spawn_rate or min(things, SPAWN_RATE)
        except Exception as error:
            log_failure(error)
            things = 0
        if self.options.headless or self.options.autostart:  # or policies would be made in the time of the run
            self.run_time, self.options.run_time = self.options.run_time or 0, None  # Locust counts from the start
            logging.getLogger("locust.main").addFilter(self.tell_run_time)
            refused = not things or self.prepare(self.options.num_users, self.options)
            if refused and self.options.headless:
                sys.exit(1)

    def prepare(self, users: int, options: argparse.Namespace) -> Exception | None:
        """Give the things of `users` their policies. Return the error that prevents a run, if there is one."""
        try:
            if self.is_running:
                refuse_too_many(users, len(self.duties))
            else:
                with opened_fleet(options) as cli:
                    if new := sum(not thing.policy_arn for thing in cli.fleet.ready):
                        log.info("giving %s a policy, %g a second", plural(new, "thing"), cli.rate)
                    self.duties = admit(cli, users)
        except Exception as error:
            log_failure(error)
            return error
        return None

    def refuse_on_page(self) -> Any:
        """Answer a request to start a run that is not possible; Locust answers the others."""
        if request.endpoint != "locust.swarm":
            return None
        form = request.form.to_dict()
        error: Exception | None = None
        try:
            users, run_time = checked(form)
        except ElfError as wrong:
            error = wrong
            log_failure(error)
        else:
            options = argparse.Namespace(**{**vars(self.options), **form, "run_time": None})
            error = self.prepare(users, options)
        if error:
            return jsonify(success=False, message=in_a_line(error))
        self.timer.kill(block=False)
        self.run_time = run_time
        of_run = {"user_count", "spawn_rate"} if self.is_running else form.keys() - {"run_time"}
        request.form = ImmutableMultiDict((key, value) for key, value in form.items() if key in of_run)
        return None

    @property
    def is_running(self) -> bool:
        return self.runner.state in (STATE_SPAWNING, STATE_RUNNING)

    def start_if_possible(self, user_count: int, *args: Any, **settings: Any) -> None:
        """Start a run, or change its users, if possible: replaces the runner's start()."""
        if not self.prepare(user_count, self.options):
            if not self.is_running:
                self.joined, self.settled = set(), set()
            self.users = user_count
            if not self.timer and getattr(self.runner, "worker_count", True):  # else Locust can't start it
                self.timer = gevent.spawn(self.time_run)
            self.start(user_count, *args, **settings)
        elif self.options.headless:
            self.environment.process_exit_code = 1
            self.runner.quit()

    def settle(self, msg: Any, **_: object) -> None:
        thing, has_joined = msg.data
        self.settled.add(thing)
        self.joined |= {thing} if has_joined else set()

    def time_run(self) -> None:
        """Wait for the things of all users, saying how many are connected, then for the time of the run; end it."""
        told = time.monotonic()
        while len(self.settled) < self.users:
            gevent.sleep(0.1)
            if time.monotonic() >= told + TELL_S:
                told += TELL_S
                log.info("connecting: %d of %s so far", len(self.joined), plural(self.users, "thing"))
        log.info("%d of %s connected", len(self.joined), plural(self.users, "thing"))
        if not self.run_time:
            return
        gevent.sleep(self.run_time)
        log.info("the run has lasted %s", plural(self.run_time, "second"))
        if self.options.headless:
            self.runner.quit()
            return
        self.runner.stop()
        if self.options.autostart and self.options.autoquit != -1:
            gevent.sleep(self.options.autoquit)
            self.runner.quit()
            self.environment.web_ui.stop()

    def stop_timer(self, **_: object) -> None:
        if self.timer is not gevent.getcurrent():
            self.timer.kill(block=False)

    def stop(self, **_: object) -> None:
        self.runner.stop()

    def count_unconnected(self, **_: object) -> None:
        """Say how many connected if the run has ended before all had, which is a failure."""
        if left := max(0, self.users - len(self.settled)):
            log.warning("the run ends with %d of %s connected", len(self.joined), plural(self.users, "thing"))
        error = ElfError("NotConnected", "not connected before the end of the run", "let it last longer")
        for _each in range(left):
            self.count("CONNECT", self.environment.host, None, error=error)
        self.users = 0

    def tell_run_time(self, record: logging.LogRecord) -> bool:
        """Correct what Locust says of a time that it does not count itself."""
        if self.run_time and str(record.msg).startswith("No run time limit set"):
            record.msg = f"Run time limit set to {self.run_time} seconds, from when all things are connected"
        return True

    def open(self, **_: object) -> None:
        super().open()
        self.free, self.worker_of = Queue(items=self.duties), {}

    def hand_out(self, msg: Any, **_: object) -> None:
        """Give a user the next free thing, once there is one, and say when it may connect."""
        thing = self.free.get()
        self.worker_of[thing] = msg.node_id
        self.turn = max(self.turn + 1 / defaults.CONNECTS_PER_S, time.monotonic())
        workers = self.runner.worker_count if isinstance(self.runner, MasterRunner) else 1
        duty = {
            **self.duties[thing],
            "after_s": self.turn - time.monotonic(),
            "connects_per_s": defaults.CONNECTS_PER_S / max(1, workers),
        }
        self.runner.send_message("elf-thing", (msg.data, duty), client_id=msg.node_id)

    def take_back(self, msg: Any, **_: object) -> None:
        if self.worker_of.get(msg.data) == msg.node_id:  # else it was given up on meanwhile
            self.set_free(msg.data)

    def set_free(self, thing: str) -> None:
        del self.worker_of[thing]
        self.free.put(thing)

    def find_cause(self, msg: Any, **_: object) -> None:
        """Ask AWS why the broker refuses a thing; if AWS gives no reason, the thing keeps trying."""
        user, facts = msg.data
        refusal = Refusal(*facts)
        self.settled.add(refusal.thing)
        with self.asking:
            verdict = elf.find_cause(self.cli, refusal.thing, refusal)
        if not isinstance(verdict, Refusal):
            known = explained(verdict)
            words = known.name, known.cause, known.remedy
            self.runner.send_message("elf-verdict", (user, *words), client_id=msg.node_id)

    def watch_workers(self) -> None:
        """Report workers that are gone. Their things are free once Locust gives up on them, a minute later."""
        while True:
            gevent.sleep(1.0)
            missing = {client.id for client in self.runner.clients.missing}
            given_up = self.gone - self.runner.clients.keys()
            things = collections.Counter(self.worker_of.values())
            for worker in things.keys() & missing - self.gone:
                lost = plural(things[worker], "thing")
                error = ElfError(
                    "WorkerGone",
                    f"worker {worker} is gone with {lost}; the other workers take them over in a minute",
                    "see its log; its last seconds are missing from the report",
                )
                log_failure(error)
                self.count("WORKER", worker, None, error=error)
            self.gone = missing | given_up
            for thing in [thing for thing, worker in self.worker_of.items() if worker in given_up]:
                self.set_free(thing)

    def await_workers(self, **_: object) -> None:
        """Have the workers stop and report, and wait for them: Locust itself waits half a second."""
        self.working = {client.id for client in self.runner.clients.all}
        self.runner.send_message("elf-finish")
        with gevent.Timeout(2 * SETTLE_S, False):
            while self.working - self.gone:
                gevent.sleep(0.05)


class Worker(Run):
    """What the users of one process share."""

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.loop = EventLoop(self.fail, selector=GeventSelector())  # the system's, under gevent, is slow
        self.waiting: dict[int, AsyncResult[dict[str, Any]]] = {}  # by the ID of the user
        self.users: dict[int, Thing] = {}  # the same
        self.has_told_of_clock = False
        self.runner.register_message("elf-thing", self.pass_on)
        self.runner.register_message("elf-verdict", self.end)
        if isinstance(self.runner, WorkerRunner):
            self.runner.register_message("elf-finish", self.finish)
            environment.events.quitting.add_listener(self.finish)

    def delivery_s(self, took_s: float) -> float | None:
        """Return how long a message took, unless the clocks of its machines differ, which is said once."""
        if not clocks_differ(took_s):
            return max(0.0, took_s)
        if not self.has_told_of_clock:
            log.warning("%s: such messages count without a time", about_clock(-took_s))
        self.has_told_of_clock = True
        return None

    def fail(self, error: Exception) -> None:
        """Report the bug that ended the loop: nothing connects or publishes here any more."""
        log_failure(error)
        self.count("WORKER", getattr(self.runner, "client_id", "local"), None, error=error)

    def pass_on(self, msg: Any, **_: object) -> None:
        user, duty = msg.data
        if user in self.waiting:
            self.waiting.pop(user).set(duty)
        else:  # it has stopped meanwhile
            self.runner.send_message("elf-give", duty["thing"])

    def end(self, msg: Any, **_: object) -> None:
        """Stop a thing, since AWS has said why it is refused."""
        user, *verdict = msg.data
        if user in self.users and (device := self.users[user].device):
            self.loop.call_soon_threadsafe(device.end, ElfError(*verdict))

    def finish(self, **_: object) -> None:
        """Stop the users, and report what they have done since Locust's last report."""
        self.runner.stop()
        data: dict[str, Any] = {}
        self.environment.events.report_to_master.fire(client_id=self.runner.client_id, data=data)
        self.runner.send_message("stats", data)
        self.runner.send_message("elf-finished")


class Thing(User, DeviceListener):
    """A thing that publishes, or one that listens."""

    def on_start(self) -> None:
        SET_UP.wait()
        self.worker: Worker = self.environment.elf_worker
        self.duty: dict[str, Any] = {}  # which the desk hands out
        self.device: Device | None = None  # none before it has a thing, and after a failure
        self.sizes: dict[int, int] = {}  # of what is not acknowledged, by number
        self.is_ready, self.is_settled = Event(), Event()
        self.worker.waiting[id(self)] = answer = AsyncResult()
        self.worker.runner.send_message("elf-take", id(self))
        self.duty = duty = answer.get()
        self.endpoint = Endpoint(*duty["endpoint"])  # until it is known by which proxy
        gevent.sleep(duty["after_s"])
        self.began = time.monotonic()
        try:
            if self.worker.failure:
                raise self.worker.failure
            raise_descriptor_limit(self.worker.runner.user_count)
            self.cli = self.worker.cli
            self.endpoint = self.endpoint.routed(defaults.NO_PROXY if self.cli.place.local else self.cli.proxy)
        except Exception as error:
            self.fail("CONNECT", self.endpoint, error)
            return
        self.messages = itertools.cycle(self.worker.messages)
        self.published = f"{self.cli.topic} ({self.worker.load})"
        self.heard = f"{''.join(duty['filters'])} ({self.worker.load})"
        self.worker.loop.connects_per_s = duty["connects_per_s"]
        self.device = Device(
            duty["thing"],
            self.cli.fleet.files(duty["thing"]),
            self.endpoint,
            self.worker.root_cert,
            self.worker.loop,
            self,
            elf.open_client,
            DeviceOptions(self.cli.qos, duty["topic"], duty["filters"]),
            duty["patience_s"],
        )
        self.worker.users[id(self)] = self
        self.worker.loop.call_soon_threadsafe(self.device.connect)
        self.is_ready.wait()
        gevent.sleep(random.uniform(0, self.cli.interval))  # noqa: S311 - so that things take turns
        self.due = time.monotonic()

    def wait_time(self) -> float:
        """Keep the interval; after a late message the next ones do not follow faster."""
        now = time.monotonic()
        self.due = max(self.due + self.cli.interval, now)
        return self.due - now

    @task
    def publish(self) -> None:
        if not self.device:
            raise StopUser
        if not self.duty["filters"]:
            self.worker.loop.call_soon_threadsafe(self.device.publish, next(self.messages), time.monotonic())

    def on_connected(self, device: Device) -> None:
        self.worker.count_connect("CONNECT", self.endpoint, time.monotonic() - self.began)
        self.worker.runner.send_message("elf-settled", (device.thing, True))
        self.is_ready.set()

    def on_connection_interrupted(self, device: Device, error: Exception, rejected: bool) -> None:
        loss = ElfError("ConnectionLost", f"{device.thing} lost its connection to {self.endpoint}", "check the network")
        self.worker.count("DISCONNECT", self.endpoint, None, error=loss)

    def on_connection_resumed(self, device: Device, after_s: float) -> None:
        self.worker.count_connect("RECONNECT", self.endpoint, after_s)

    def on_refused(self, device: Device, refusal: Refusal) -> None:
        facts = (refusal.thing, refusal.endpoint, refusal.action, refusal.subject)
        self.worker.runner.send_message("elf-refused", (id(self), facts))

    def on_failed(self, device: Device, failure: Exception) -> None:
        if device.was_connected:
            self.fail("PUBLISH", self.published, failure)
        else:
            self.fail("CONNECT", self.endpoint, failure)

    def on_publish(self, device: Device, number: int, topic: str, payload: bytes, late_s: float) -> None:
        self.sizes[number] = len(payload)
        if not self.cli.qos:
            self.count_published(number, None)

    def on_dropped(self, device: Device, number: int, topic: str, payload: bytes) -> None:
        self.sizes[number] = len(payload)
        self.count_published(number, None, lost=True)

    def on_puback(self, device: Device, number: int, after_s: float, after_due_s: float) -> None:
        self.count_published(number, after_s)

    def on_not_sent(self, device: Device, count: int) -> None:
        for _ in range(count):
            self.count_published(0, None, lost=True)

    def on_invalid_message(self, device: Device, number: int, error: Exception) -> None:
        self.worker.count("PUBLISH", self.published, None, error=error)

    def on_message(self, device: Device, message: Any) -> None:
        sent_at = None if message.retain else time_of_sending(object_in(message.payload))
        took_s = None if sent_at is None else self.worker.delivery_s(time.time() - sent_at)
        self.worker.count("RECEIVE", self.heard, took_s, len(message.payload))

    def on_unreadable_message(self, device: Device, error: Exception) -> None:
        self.worker.count("RECEIVE", self.heard, None, error=error)

    def count_published(self, number: int, took_s: float | None, lost: bool = False) -> None:
        error = ElfError("MessagesLost", "1 message lost", "check the network") if lost else None
        self.worker.count("PUBLISH", self.published, took_s, self.sizes.pop(number, 0), error)

    def fail(self, kind: str, name: object, error: Exception) -> None:
        """Stop the thing, and count a failure."""
        self.device = None
        self.is_ready.set()
        self.worker.count(kind, name, None, error=error)
        self.worker.runner.send_message("elf-settled", (self.duty["thing"], False))

    def settle(self, device: Device, deadline: float) -> None:
        """Disconnect once all is acknowledged, or at the deadline."""
        if device.backlog and time.monotonic() < deadline:
            self.worker.loop.call_at(time.monotonic() + defaults.MIN_INTERVAL_S, self.settle, device, deadline)
        else:
            device.end(device.unresolved)
            self.is_settled.set()

    def on_stop(self) -> None:
        self.worker.waiting.pop(id(self), None)
        self.worker.users.pop(id(self), None)
        if self.device:
            self.worker.loop.call_soon_threadsafe(self.settle, self.device, time.monotonic() + SETTLE_S)
            self.is_settled.wait(2 * SETTLE_S)  # or the loop has ended
        for number in list(self.sizes):
            self.count_published(number, None, lost=True)
        if self.duty:
            self.worker.runner.send_message("elf-give", self.duty["thing"])


@events.init.add_listener  # type: ignore[untyped-decorator]
def set_up(environment: Any, web_ui: Any, **_: object) -> None:
    hide_environment()
    for handler in logging.getLogger().handlers:  # Locust's own
        handler.addFilter(take_out_secrets)
    if misc_dir := vars(environment.parsed_options).pop("misc_dir"):  # or a master's would overrule its workers'
        os.environ["ELF_MISC_DIR"] = misc_dir
    # Python raises Ctrl-C in any greenlet, even one that answers the page; Locust ends cleanly in the main one alone.
    stop = gevent.get_hub().handle_system_error
    handler = gevent.signal_handler(signal.SIGINT, stop, KeyboardInterrupt, KeyboardInterrupt())
    environment.events.quit.add_listener(lambda **_: handler.cancel())  # Locust sends one more to its other processes
    if not isinstance(environment.runner, MasterRunner):
        environment.elf_worker = Worker(environment)
    if not isinstance(environment.runner, WorkerRunner):
        Desk(environment, web_ui)
    SET_UP.set()


if __name__ == "__main__":  # `locust --help` shows only Locust's own options
    about = "What ELF adds to Locust's options. With --web-login the page asks for the password in ELF_WEB_PASSWORD."
    shown = LocustArgumentParser(usage="locust [options]", description=about, add_help=False)
    add_options(shown)
    shown.print_help()
