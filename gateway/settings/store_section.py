"""The section `store` of the settings, with the parts of its URL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import Field, SecretStr, model_validator

from gateway.settings.secret_files import read_secret
from gateway.settings.section import Section
from gateway.settings.value_types import File

VALKEY_PORT, SENTINEL_PORT = 6379, 26379
_SCHEMES = {"valkey", "valkeys", "redis", "rediss"}


class Store(Section):
    """`store.*`: the Valkey or Redis server that replicas share, if any."""

    url: SecretStr = SecretStr("")
    username_file: File = None
    password_file: File = None
    ca_file: File = None
    client_cert_file: File = None
    client_key_file: File = None
    sentinel_service: str = ""
    sentinel_username_file: File = None
    sentinel_password_file: File = None
    cluster: bool = False
    key_prefix: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9:._-]{1,64}$", description="1 to 64 letters, digits, :, ., _ and -"),
    ] = "sd-gateway"
    timeout_seconds: Annotated[float, Field(gt=0, le=1)] = 0.05

    @model_validator(mode="after")
    def _url(self) -> Store:
        if not self.url.get_secret_value():
            return self
        try:
            parts, hosts = self._parts, self.hosts
        except ValueError:  # an incomplete IPv6 address, or a port that is not a number
            parts, hosts = urlsplit(""), []
        well_formed = parts.scheme in _SCHEMES and all(host for host, _ in hosts)
        if not well_formed or parts.query or parts.fragment:
            raise ValueError("url: must be valkey://, valkeys://, redis:// or rediss:// and a host")
        if not re.fullmatch(r"(/[0-9]{0,5})?", parts.path) or (self.cluster and self.database):
            raise ValueError("url: the path must be empty or a database number; clusters have only 0")
        if self.cluster and self.sentinel_service:
            raise ValueError("cluster: cannot be combined with store.sentinel_service")
        if len(hosts) > 1 and not (self.cluster or self.sentinel_service):
            raise ValueError("url: several hosts require store.cluster or store.sentinel_service")
        return self

    @model_validator(mode="after")
    def _client_certificate(self) -> Store:
        if self.client_cert_file and not self.client_key_file:
            raise ValueError("client_cert_file: needs store.client_key_file")
        if self.client_key_file and not self.client_cert_file:
            raise ValueError("client_key_file: needs store.client_cert_file")
        return self

    @property
    def _parts(self) -> SplitResult:
        return urlsplit(self.url.get_secret_value())

    @property
    def hosts(self) -> list[tuple[str, int]]:
        """Host and port of the server, of the cluster's seed nodes, or of the Sentinels."""
        default = SENTINEL_PORT if self.sentinel_service else VALKEY_PORT
        hosts = [urlsplit(f"//{host}") for host in self._parts.netloc.rpartition("@")[2].split(",")]
        return [(host.hostname or "", host.port or default) for host in hosts]

    @property
    def tls(self) -> bool:
        """Whether connections use TLS; the server's certificate is verified."""
        return self._parts.scheme in {"valkeys", "rediss"}

    @property
    def database(self) -> int:
        """The database number."""
        return int(self._parts.path.removeprefix("/") or 0)

    def login(self) -> tuple[str | None, str | None]:
        """Return user name and password; the files are read at each call.

        Raises:
            OSError: A file cannot be read.
            ValueError: A file is not a regular file or too large, or has no valid secret.
        """
        user, _, password = map(unquote, self._parts.netloc.rpartition("@")[0].partition(":"))
        return _read_file(self.username_file) or user or None, _read_file(
            self.password_file
        ) or password or None

    def sentinel_login(self) -> tuple[str | None, str | None]:
        """Return user name and password for the Sentinels. Raises as `login` does."""
        return _read_file(self.sentinel_username_file) or None, _read_file(
            self.sentinel_password_file
        ) or None


def _read_file(file: Path | None) -> str:
    return "" if file is None else read_secret(file).text
