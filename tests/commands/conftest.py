"""What tests of commands use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.shell import Elf, InProcess
from support.sign_in import Services


@pytest.fixture
def services() -> Iterator[Services]:
    server = Services()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def signed_out(main: InProcess, elf: Elf, services: Services, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """A user without credentials, whose STS, SSO and metadata services are `services`."""
    main.forget("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    home = elf.home / ".aws"
    home.mkdir()
    monkeypatch.setattr("botocore.tokens.SSOTokenProvider._SSO_TOKEN_CACHE_DIR", str(home / "sso" / "cache"))
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0)
    names = ("AWS_ENDPOINT_URL_STS", "AWS_ENDPOINT_URL_SSO", "AWS_ENDPOINT_URL_SIGNIN")
    main.use(dict.fromkeys(names, services.url) | {"AWS_EC2_METADATA_SERVICE_ENDPOINT": services.url})
    return main
