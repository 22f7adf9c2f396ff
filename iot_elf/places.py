# SPDX-License-Identifier: Apache-2.0
"""Where a fleet is: its region and account, and what an ARN says of them."""

from __future__ import annotations

import contextlib
import re
from typing import Any, NamedTuple

from iot_elf.errors import ElfError

# The valid values of a place in elf.json: they are sent to AWS, connected to and printed. Not compiled for --help.
PLACE_PATTERNS = {
    "region": r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?",
    "profile": r"[^\x00-\x1f\x7f]{1,256}",
    "endpoint_url": (
        r"https?://([a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?|\[[0-9a-f:.]+\])"
        r"(:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?"
        r"(/[^\s\x00-\x1f\x7f]*)?"
    ),
    "account": r"[0-9]{12}",
    "data_endpoint": r"[a-z0-9._-]{1,253}",
    "partition": r"[a-z0-9-]{1,40}",
}
# https://docs.aws.amazon.com/general/latest/gr/rande.html: how the names of a partition's regions begin
_REGIONS_OF = {
    "aws-cn": "cn-",
    "aws-us-gov": "us-gov-",
    "aws-eusc": "eusc-",
    "aws-iso": "us-iso-",
    "aws-iso-b": "us-isob-",
}


class Place(NamedTuple):
    """Where a fleet is."""

    region: str | None = None
    profile: str | None = None
    endpoint_url: str | None = None  # of the control plane
    account: str | None = None
    data_endpoint: str | None = None  # describe_endpoint's answer, which differs for every account and region
    local: bool = False
    source: str | None = None  # of the credentials, as botocore names it; not recorded
    region_from: str | None = None  # where it was set, unless it is the default; not recorded
    partition: str | None = None  # of its ARNs: aws, aws-cn

    def __str__(self) -> str:
        if self.local:
            return f"the embedded AWS IoT (--local), region {self.region}"
        parts = {"region": self.region, "account": self.account, "profile": self.profile}
        parts["credentials from"] = None if self.profile else self.source
        parts["endpoint"] = None if ".amazonaws." in (self.endpoint_url or "") else self.endpoint_url
        return ", ".join(f"{what} {value}" for what, value in parts.items() if value)

    def at(self, arn: str | None) -> Place:
        """Return it with the partition and the account of one of its ARNs."""
        _, partition, _, _, account = (arn or "").split(":")[:5]
        return self._replace(partition=partition, account=account)

    def has(self, arn: str) -> bool:
        """Return whether an ARN is of this place, as far as both are known."""
        _, partition, _, region, account = arn.split(":")[:5]
        known = (self.partition, partition), (self.region, region), (self.account, account)
        return all(mine is None or mine == its for mine, its in known)

    def is_same(self, other: Place) -> bool:
        """Return whether it is the same region of the same account, as far as both are known."""
        keys = ("region", "account") if self.account and other.account else ("region", "data_endpoint")
        pairs = [(getattr(self, key), getattr(other, key)) for key in keys]
        return self.local == other.local and all(mine == its or not (mine and its) for mine, its in pairs)

    def checked(self) -> Place:
        """Return it in lower case where AWS uses lower case. Raises ElfError for a value that is not valid."""
        if "@" in (self.endpoint_url or ""):
            raise ElfError(
                "LoginInEndpointUrl",
                "the endpoint URL contains a user name or password, which AWS does not use and ELF does not record",
                "remove what is before the @ in --endpoint-url, AWS_ENDPOINT_URL or AWS's configuration",
            )
        lower: dict[str, Any] = {}
        for key, pattern in PLACE_PATTERNS.items():
            if (value := getattr(self, key)) is not None:
                case = "" if key == "profile" else "(.*?://)?[^/]*"  # a URL's path may have capitals
                lower[key] = re.sub(rf"\A{case}", lambda found: found[0].lower(), value)
                if not re.fullmatch(pattern, lower[key]):
                    raise ElfError(
                        "BadPlace",
                        f"{value!r:.140} is not a valid {key.replace('_url', ' URL').replace('_', ' ')}",
                        "check --region (one is us-west-2), --profile and --endpoint-url, and AWS's configuration",
                    )
        return self._replace(**lower)


def recorded_place(recorded: Any) -> Place | None:
    """Read where the fleet is. Raises ValueError and TypeError."""
    if recorded is None:
        return None
    with contextlib.suppress(ElfError):
        known = {key: value for key, value in {**recorded}.items() if key in (*PLACE_PATTERNS, "local")}
        place = Place(**known).checked()
        if isinstance(place.local, bool):
            return place
    raise ValueError("fleet is not valid")


def place_entry(place: Place | None) -> dict[str, Any] | None:
    if not place:
        return None
    kept = place._replace(source=None, region_from=None)
    return {key: value for key, value in kept._asdict().items() if value}


def account_part(arn: str) -> str:
    """Return an ARN as far as the account."""
    return arn.rpartition(":")[0]


def place_of(arn: str) -> str:
    _, partition, _, region, account = arn.split(":")[:5]
    return f"region {region}, account {account}" + (f", partition {partition}" if partition != "aws" else "")


def is_possible(arn: str) -> bool:
    """Return whether an ARN's partition can have its region. That of emulators is aws, whatever the region is."""
    _, partition, _, region, _ = arn.split(":")[:5]
    return region.startswith(_REGIONS_OF.get(partition, ""))
