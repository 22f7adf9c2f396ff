# SPDX-License-Identifier: Apache-2.0
"""Numbers and names that two modules need: AWS IoT's limits, and how long ELF waits."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TypeVar

VERSION = "1.0.0"
HERE = Path(__file__).resolve().parent.parent  # where elf.py is
POSIX = hasattr(os, "fork")  # Windows has no fork, file modes, descriptors of directories, nor harmless os.kill(pid, 0)
VERBOSE = logging.INFO - 1  # the level of --verbose
T = TypeVar("T")

# What is used where nothing is given
REGION = "us-west-2"
TOPIC_ROOT = "elf"
INTERVAL_S = 1.0
NO_PROXY = "none"

# https://docs.aws.amazon.com/general/latest/gr/iot-core.html: AWS IoT's limits
MQTT_PORT = 8883
MAX_PAYLOAD_BYTES = 128 * 1024
MAX_CLIENT_ID_BYTES = 128
MIN_INTERVAL_S = 0.01  # 100 publishes per second and connection
RETAIN_INTERVAL_S = 1.0  # 1 retained publish per second and topic
CONNECTS_PER_S = 400.0  # AWS allows 500 per account
THINGS_PER_S = 10.0  # what the quotas of the control plane allow
# https://docs.aws.amazon.com/iot/latest/developerguide/iot-policies.html: a changed policy takes 6 to 8 minutes.
POLICY_CHANGE_S = 480.0
CONSISTENCY_S = 300.0  # what was detached may still count as attached (DeletePolicy, AWS IoT API reference)

# How long ELF waits
CONNECT_TIMEOUT_S = 5.0  # TCP, TLS and the CONNACK, each; and a connection to the control plane
FIRST_CONNECT_S = 60.0  # while the first connect of a thing is tried again, where that may help
CALL_TIMEOUT_S = 20.0  # for the control plane's answer
CALL_ATTEMPTS = 10  # with pauses, about a minute, to outlast throttling
FAREWELL_S = 1.0  # for the other side to close a connection on which ELF sends no more
STOP_S = 4.0  # for running calls to finish after Ctrl-C; a shell or a container waits little longer
REDRAW_INTERVAL_S = 0.2  # of the live line; no wait is longer without a look at Ctrl-C

# How many
CALLS_IN_FLIGHT = 20  # 10 things a second at 2 s per thing; AWS takes half of that
DIAGNOSES_AT_ONCE = 4  # of things that the broker refuses
MAX_PER_TURN = 64  # messages that are sent, or read from a connection, before the loop does other work
MAX_LISTED = 20  # at most this many things or messages get a line each without --verbose
MAX_FILE_BYTES = 64 * 1024 * 1024  # of a file that the user names
