# SPDX-License-Identifier: Apache-2.0
"""The broker's refusals of a thing, in a row: what they mean."""

from __future__ import annotations

import time

from iot_elf import defaults
from iot_elf.errors import Refusal

ENOUGH_REFUSALS = 5  # in a row: no accident, and not the policy, if AWS says so and no change can be on its way


class RefusalTracker:
    """The broker's refusals of a thing, in a row: whether to ask AWS about them, and when to give up.

    In the first `patience_s` seconds they do not count: what was made just now may not have taken effect. A message is
    refused by closing the connection, so that a connection is on trial from its first message on, until it has survived
    that.
    """

    def __init__(self, patience_s: float) -> None:
        self.last: Refusal | None = None  # if nothing has succeeded since
        self.is_on_trial = False
        self._has_sent = False  # on this connection
        self._patient_until = time.monotonic() + patience_s
        self._in_a_row = 0
        self._since = 0.0  # time.monotonic()

    def add(self, refusal: Refusal) -> tuple[bool, bool]:
        """Count a refusal; return whether AWS should be asked about it, and whether to give up.

        The loss of a connection on trial may have other causes: AWS is asked at the second in a row.
        """
        now = time.monotonic()
        if not self.last:
            self._in_a_row, self._since = 0, now
        if not (self.last and self.last.is_explained and self.last.action == refusal.action):
            self.last = refusal
        if now < self._patient_until:
            return False, False
        self._in_a_row += 1
        is_certain = self._in_a_row == (2 if refusal.action == "iot:Publish" else 1)
        is_final = self.last.is_final and self._in_a_row >= ENOUGH_REFUSALS
        return is_certain, is_final or now > self._since + defaults.POLICY_CHANGE_S

    def explain(self, refusal: Refusal) -> None:
        """Keep what AWS said of a refusal, if nothing has succeeded since."""
        if self.last and self.last.action == refusal.action:
            self.last = refusal

    def on_online(self) -> None:
        """Take note of a new connection, and so of the success of CONNECT and SUBSCRIBE."""
        self.is_on_trial = self._has_sent = False
        if self.last and self.last.action != "iot:Publish":
            self.last = None

    def on_send(self) -> bool:
        """Put the connection on trial, and return True, if this is its first message."""
        is_first, self._has_sent = not self._has_sent, True
        self.is_on_trial = self.is_on_trial or is_first
        return is_first

    def on_success(self) -> None:
        """Take note that the broker took a message."""
        self.is_on_trial, self.last = False, None

    def clear(self) -> None:
        self.last = None
