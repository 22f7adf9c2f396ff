# SPDX-License-Identifier: Apache-2.0
"""boto3's session: credentials, STS, MFA."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from iot_elf import defaults
from iot_elf.errors import ElfError, bad_endpoint, explained
from iot_elf.events import Interrupted
from iot_elf.state import Place
from iot_elf.text import add_secret


def open_session(
    place: Place, proxies: Mapping[str, str] | None, ask_for_code: Callable[[str], str]
) -> tuple[Any, Place]:
    """Make boto3's session for `place`, and complete the place from AWS's configuration. No call is made yet.

    `proxies` are by scheme; None: those of the environment. `ask_for_code` returns the MFA code for a prompt; where a
    role needs one, it is called when the credentials are first needed.
    Raises ElfError for a place that is not valid; botocore's errors.
    """
    session = _make_session(place, proxies)
    session.events.register("before-sign", _check_credentials)
    if not place.local:
        region = place.region or os.environ.get("AWS_REGION") or session.region_name or defaults.REGION
        place = place._replace(region=region).checked()
        session._session.set_config_variable("region", place.region)  # for STS
        assume_role = session._session.get_component("credential_provider").get_provider("assume-role")
        assume_role._prompter = ask_for_code
        assume_role.cache = _role_cache()
        if not place.profile and "AWS_ACCESS_KEY_ID" not in os.environ:
            place = place._replace(profile=os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE"))
    return session, place


def _make_session(place: Place, proxies: Mapping[str, str] | None) -> Any:
    """Make boto3's session. For the embedded AWS IoT, no credential or profile of the user's is even read."""
    uses_login = False
    with contextlib.suppress(OSError, RuntimeError):  # no such file, or no home directory
        configuration = Path(os.environ.get("AWS_CONFIG_FILE", "~/.aws/config")).expanduser()
        uses_login = not place.local and b"login_session" in configuration.read_bytes()
    if not uses_login:
        # botocore imports awscrt if it can, which takes 40 ms, and needs it only for `aws login`.
        sys.modules.setdefault("awscrt", None)  # type: ignore[arg-type]
    import boto3
    import botocore.config
    import botocore.session

    if not sys.modules.get("awscrt"):
        sys.modules.pop("awscrt", None)  # whoever imports ELF may want it

    if place.local:
        nothing, empty = (None, None, None, None), (None, None, os.devnull, None)
        core = botocore.session.Session({"profile": nothing, "config_file": empty, "credentials_file": empty})
        session = boto3.Session("test", "test", region_name=place.region or defaults.REGION, botocore_session=core)
    else:
        session = boto3.Session(profile_name=place.profile, region_name=place.region)
    config = botocore.config.Config(
        proxies={} if place.local else proxies,
        retries={"mode": "standard", "total_max_attempts": 3 if place.local else defaults.CALL_ATTEMPTS},
        connect_timeout=defaults.CONNECT_TIMEOUT_S,
        read_timeout=defaults.CALL_TIMEOUT_S,
        max_pool_connections=defaults.CALLS_IN_FLIGHT,
        user_agent_extra=f"aws-iot-elf/{defaults.VERSION}",
    )
    session._session.set_default_client_config(config)
    return session


def _role_cache() -> Any:
    """Return the AWS CLI's cache of roles' sessions, so that one MFA code lasts as long as there."""
    from botocore.utils import JSONFileCache

    class Cache(JSONFileCache):  # type: ignore[misc]
        def __setitem__(self, key: str, value: Any) -> None:
            with contextlib.suppress(OSError):  # ~/.aws may be mounted read-only
                super().__setitem__(key, value)

    return Cache(os.path.expanduser("~/.aws/cli/cache"))  # noqa: PTH111 - Path's raises where there is no home


def fetch_credentials(session: Any) -> Any:
    """Return the session's credentials, or None. Raises ElfError if they can't be fetched."""
    from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

    try:
        if credentials := session.get_credentials():
            credentials.get_frozen_credentials()
        return credentials
    except (ElfError, Interrupted):
        raise
    except Exception as error:
        cause, remedy = f"could not get AWS credentials: {type(error).__name__}: {error}", "check where they come from"
        failure = ElfError("CredentialsUnavailable", cause, remedy)
        is_known = isinstance(error, BotoCoreError | ClientError) and not isinstance(error, ParamValidationError)
        if is_known or bad_endpoint(error):
            failure = explained(error)
        elif "Auth token" in str(error):  # of a container
            failure.remedy = "remove the line end from AWS_CONTAINER_AUTHORIZATION_TOKEN, or from its _FILE"
        failure.cause = failure.cause.rstrip(".") + _credential_sources(session)
        raise failure from error


def _credential_sources(session: Any) -> str:
    """Return the profiles and settings that the credentials come from, in parentheses, without secrets."""
    profiles, name, used = session._session.full_config["profiles"], session.profile_name, []
    while name in profiles and name not in used:
        used.append(name)
        name = profiles[name].get("source_profile")
    keys = ("credential_process", "web_identity_token_file", "role_arn", "sso_session", "sso_start_url")
    settings = [f"{key} {str(its[key]).split()[0]}" for its in map(profiles.get, used) for key in keys if its.get(key)]
    settings += [key for key in os.environ if re.match("AWS_(CONTAINER_|WEB_IDENTITY_TOKEN_FILE|ROLE_ARN)", key)]
    found = ", ".join([f"profile {' > '.join(used)}"] * bool(used) + settings)
    return f" ({found})" if found else ""


def find_data_endpoint(session: Any, iot: Any, place: Place) -> str:
    """Ask AWS for the host name of its MQTT broker. Raises ElfError when these credentials are for another account.

    Where the host name does not tell the account, it asks STS, which needs no permission.
    """
    address: str = iot.describe_endpoint(endpointType="iot:Data-ATS")["endpointAddress"]
    host = address.partition(":")[0].lower()
    # Its first label differs for every account; in moto's server, for every answer.
    is_same = (place.data_endpoint or "").partition(".")[0] == host.partition(".")[0]
    if place.account and not is_same:
        url = None if ".amazonaws.com" in (place.endpoint_url or "") else place.endpoint_url
        sts = session.client("sts", region_name=place.region, endpoint_url=url)
        is_same = sts.get_caller_identity()["Account"] == place.account
    if not is_same and (place.data_endpoint or place.account):
        raise ElfError(
            "OtherAccount",
            f"these credentials are for another account: this fleet is in {place}",
            "use the credentials that created it, or another directory with --misc-dir",
        )
    return host


def _check_credentials(request_signer: Any, **_: object) -> None:
    """Hide the credentials that sign a request (the session's, or those that assume a role): before-sign event.

    Raises ElfError if one is not valid in HTTP: a copied one may end with a line end.
    """
    credentials = request_signer._credentials
    secrets = credentials.get_frozen_credentials()[:3] if credentials else ()
    add_secret(*secrets)
    for name, value in zip(("access key ID", "secret access key", "session token"), secrets):  # noqa: B905 - or none
        if value and not re.fullmatch("[!-~]+", value):
            source = "a role's source_profile" if credentials.method == "explicit" else credentials.method
            raise ElfError(
                "BadCredentials",
                f"the AWS {name} (from {source}) contains a line end, a space or another character that is not valid "
                "in it",
                "set it again without that character, then check it with `aws sts get-caller-identity`",
            )


def environment_of(place: Place) -> dict[str, str | None]:
    """Return the variables of a place on AWS, without the region's; None: not set, as it would override the others."""
    variables: dict[str, str | None] = {}
    if place.profile:
        overriding = ("AWS_DEFAULT_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        variables |= {**dict.fromkeys(overriding), "AWS_PROFILE": place.profile}
    if url := place.endpoint_url:
        of_all, of_iot = "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_IOT"
        variables |= dict.fromkeys((of_all, of_iot, "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"))
        if not url.startswith(f"https://iot.{place.region}.amazonaws.com"):
            variables[of_iot if ".amazonaws." in url else of_all] = url  # a VPC's endpoint serves only AWS IoT
    return variables
