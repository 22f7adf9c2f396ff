"""ELF reaches into the SDK where that offers no way: what it relies on there is what the SDK has."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from typing import Any

import pytest
from support.program import ROOT, program_text

PIN = "AWSIoTPythonSDK>=1.6.1,<1.7"
# What ELF calls each of the SDK's parts, and what it uses of it.
SEAMS = {
    "MQTTLib": "AWSIoTMQTTClient",
    "mqtt_core": "MqttCore Queue",
    "clients": "InternalAsyncMqttClient",
    "workers": "EventProducer EventConsumer SubscriptionManager",
    "paho": "time CONNACK_REFUSED_PROTOCOL_VERSION _socketpair_compat",
    "kind": "_logger",
    "client": (
        "configureEndpoint configureCredentials configureSocketFactory configureOfflinePublishQueueing "
        "disableMetricsCollection connectAsync disconnectAsync subscribeAsync onMessage configureLastWill _mqtt_core"
    ),
    "client._mqtt_core": "_event_queue _event_consumer _internal_async_client publish_async",
    "client._mqtt_core._event_consumer": "start _stopper _dispatch_one",
    "client._mqtt_core._internal_async_client": "_paho_client _event_callback_map",
    "paho client": (
        "_thread _backoffCore _max_inflight_messages _message_retry _ssl _last_msg_in _ping_t "
        "want_write loop_write loop_read loop_misc _mid_generate on_connect _send_puback _client_id"
    ),
}
ALIASES = ("events", "inner", "_paho")  # of three of these parts
PYTHONS = {"print", "set", "__name__", "encode"}  # built in, hidden from a module; of an Event, a class, a str
BOTOCORES = {"register", "register_first", "register_last"}  # of its events


def test_the_sdk_has_what_elf_relies_on_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "AWSIoTPythonSDK"]:
        monkeypatch.delitem(sys.modules, name)  # which ELF has mended
    version = importlib.import_module("AWSIoTPythonSDK").__version__
    inner = "AWSIoTPythonSDK.core.protocol"
    modules = {
        "MQTTLib": "AWSIoTPythonSDK.MQTTLib",
        "mqtt_core": f"{inner}.mqtt_core",
        "clients": f"{inner}.internal.clients",
        "workers": f"{inner}.internal.workers",
        "paho": f"{inner}.paho.client",
    }
    parts: dict[str, Any] = {name: importlib.import_module(path) for name, path in modules.items()}
    client = parts["client"] = parts["MQTTLib"].AWSIoTMQTTClient("seams")

    def part(path: str) -> Any:
        if path == "paho client":
            return client._mqtt_core._internal_async_client._paho_client
        first, *rest = path.split(".")
        found = parts[first]
        for name in rest:
            found = getattr(found, name)
        return found

    for path, names in SEAMS.items():
        if path == "kind":
            continue
        for name in names.split():
            assert hasattr(part(path), name), f"the SDK {version} has no {name} in its {path}, on which ELF relies"
    for owner in ("mqtt_core", "clients", "workers"):
        for name in SEAMS[owner].replace("Queue", "").split():
            kind = getattr(parts[owner], name)
            assert hasattr(kind, "_logger"), f"the SDK {version} has no _logger in its {name}, which ELF silences"
    signature = inspect.signature(client.connectAsync)
    assert "ackCallback" in signature.parameters, f"the SDK {version} has no ackCallback in its connectAsync()"
    publish = client._mqtt_core.publish_async
    for function, count in (
        *((publish, 5), (client.subscribeAsync, 3), (client.configureCredentials, 3), (client.configureLastWill, 4)),
    ):
        try:
            inspect.signature(function).bind(*range(count))
        except TypeError:
            pytest.fail(f"the SDK {version} takes other arguments in its {function.__name__}() than ELF gives it")


def test_the_seams_are_all_that_elf_uses() -> None:
    known = {name for names in SEAMS.values() for name in names.split()}
    roots = "|".join(map(re.escape, [*SEAMS, *ALIASES]))
    opening = program_text("elf").partition("def open_client(")[2].partition("\n\n\n")[0]
    used = re.findall(rf"\b(?:self\.)?(?:{roots})((?:\.\w+)+)", program_text("mqtt") + opening)
    assert len(used) > 30
    unknown = {name for chain in used for name in chain[1:].split(".")} - known - PYTHONS - BOTOCORES
    assert not unknown, f"the table of seams does not have {sorted(unknown)}, which ELF uses"


@pytest.mark.parametrize("name", ["requirements.txt", "elf.py"])
def test_the_sdk_is_pinned_to_what_has_these_seams(name: str) -> None:
    assert PIN in (ROOT / name).read_text()
