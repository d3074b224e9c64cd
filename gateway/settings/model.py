"""The settings: names, defaults and bounds. Durations are in seconds.

Each section is a model of its own; `store_section.py` has the section `store`. `loading.py` reads the
sections, and `error_messages.py` writes the texts of pydantic's errors. A validator of a section raises
ValueError with the key, a colon and the text of the message.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from gateway.domain.task import Operation, Status
from gateway.settings.section import Section
from gateway.settings.store_section import Store
from gateway.settings.value_types import (
    AddressHeader,
    AtLeastTenth,
    Count,
    File,
    HeaderName,
    Host,
    Networks,
    NotNegative,
    Origin,
    Port,
    Positive,
    Separated,
)

LOOPBACK_NAMES = ("localhost", "*.localhost", "127.0.0.1", "[::1]")
_URL_PATH = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@/-]*")  # RFC 3986, 3.3, without escapes
# Paths of the gateway, without those below them. If the root path hid one of them, a request for it would
# have two meanings, because an ingress may remove the root path. A test compares them with the OpenAPI
# document.
OWN_PATHS = (
    *("/v1/progress", "/v1/results", "/v1/events", "/web", "/docs", "/openapi.json", "/favicon.ico"),
    *("/healthz", "/readyz", "/metrics"),
    *(f"/scc/{operation}" for operation in Operation),
)
_MAX_SOCKET_PATH_BYTES = 107  # Linux, unix(7): 108 bytes with the final zero
DIRECT = "direct"  # a value of upstream.proxy
PROXY_FORMS = "an http, https or socks5 URL such as http://proxy.example.com:3128"
_PROXY_SCHEMES = {"http", "https", "socks5", "socks5h"}


class Server(Section):
    """`server.*`: the listening socket, HTTP limits and shutdown."""

    # Not empty: a socket would listen on every address, and an empty variable is likely an oversight.
    host: Annotated[str, Field(min_length=1, description="a host name or an IP address")] = "127.0.0.1"
    port: Port = 8080
    metrics_port: Port = 0
    uds: str = ""
    root_path: str = ""
    cors_origins: Annotated[list[Origin], Separated] = []
    cors_headers: Annotated[list[HeaderName], Separated] = []
    cors_expose_headers: Annotated[list[HeaderName], Separated] = []
    cors_max_age_seconds: Annotated[int, Field(ge=0, le=86_400)] = 600
    cors_credentials: bool = False
    cors_private_network: bool = True
    edge: bool = True  # the fast path for cache hits (`server/fast_path.py`)
    header_seconds: AtLeastTenth = 10.0
    max_header_bytes: Annotated[int, Field(ge=1024, le=1_048_576)] = 32_768
    max_header_count: Annotated[int, Field(ge=10, le=10_000)] = 100
    keep_alive_seconds: Positive = 620.0
    max_connections: Count = 25_000
    trusted_hosts: Annotated[list[Host], Separated] = []
    trusted_proxies: Networks = ["127.0.0.1"]
    client_address_headers: Annotated[list[AddressHeader], Separated] = [
        "X-Forwarded-For",
        "Forwarded",
        "X-Real-IP",
    ]
    drain_seconds: Positive = 20.0

    @field_validator("host")
    @classmethod
    def _host(cls, value: str) -> str:
        if value.count(":") == 1 or value.startswith("[") or "/" in value or any(map(str.isspace, value)):
            raise ValueError("must be a host name or an IP address, without scheme, port and brackets")
        return value

    @field_validator("uds")
    @classmethod
    def _uds(cls, value: str) -> str:
        if len(value.encode()) > _MAX_SOCKET_PATH_BYTES or "\0" in value:
            raise ValueError(f"must be a path of at most {_MAX_SOCKET_PATH_BYTES} bytes")
        return value

    @field_validator("root_path")
    @classmethod
    def _root_path(cls, value: str) -> str:
        if value and (not value.startswith("/") or value.endswith("/")):
            raise ValueError('must be empty, or begin with "/" and not end with it')
        if not _URL_PATH.fullmatch(value):
            raise ValueError("may contain only ASCII letters, digits and -._~!$&'()*+,;=:@/")
        if {"", ".", ".."} & {*value.split("/")[1:]}:
            raise ValueError('must not contain "//", and no part of it may be "." or ".."')
        for path in OWN_PATHS if value else ():
            if f"{path}/".startswith(f"{value}/") or f"{value}/".startswith(f"{path}/"):
                raise ValueError(f"must not hide a path of the gateway itself: {path}")
        return value

    @model_validator(mode="after")
    def _two_ports(self) -> Server:
        if self.metrics_port and self.metrics_port == self.port:
            raise ValueError("metrics_port: must differ from server.port; 0 serves /metrics on server.port")
        return self

    @model_validator(mode="after")
    def _cors_credentials(self) -> Server:
        # Any page of the internet could otherwise send requests with the user's cookies, and read responses.
        if self.cors_credentials and {"*", "null"} & {*self.cors_origins}:
            raise ValueError('cors_credentials: cannot be combined with "*" or "null" in server.cors_origins')
        return self

    @property
    def allowed_hosts(self) -> list[str]:
        """The accepted values of the Host header: `trusted_hosts`, or a default for the listening address.

        A gateway on a loopback address accepts only loopback names. This prevents DNS rebinding, where a web
        page's own host name resolves to 127.0.0.1. On any other address every name is accepted, and also on a
        Unix socket, which browsers cannot reach.
        """
        if self.trusted_hosts:
            return self.trusted_hosts
        if self.uds:
            return ["*"]
        return [*LOOPBACK_NAMES, self.host] if is_loopback(self.host) else ["*"]


class Upstream(Section):
    """`upstream.*`: the vendor API, and the limits of the calls to it."""

    endpoint: str = "https://openai.edu-aliyun.com"
    allow_insecure: bool = False
    operations: Annotated[list[Operation], Separated, Field(min_length=1)] = list(Operation)
    stage: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9_-]*$", description="empty, or letters, digits, _ and -")
    ] = ""
    timeout_seconds: AtLeastTenth = 10.0
    attempt_timeout_seconds: AtLeastTenth = 5.0
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    max_in_flight: Annotated[int, Field(ge=1, le=10_000)] = 64
    requests_per_second: Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)] = 0.0
    max_response_bytes: Annotated[int, Field(ge=1024, le=1_073_741_824)] = 1_048_576
    connection_max_age_seconds: Positive = 300.0
    proxy: SecretStr = SecretStr("")
    ca_file: File = None
    client_cert_file: File = None
    client_key_file: File = None

    @model_validator(mode="after")
    def _certificate(self) -> Upstream:
        if self.client_cert_file and not self.client_key_file:
            raise ValueError("client_cert_file: needs upstream.client_key_file")
        if self.client_key_file and not self.client_cert_file:
            raise ValueError("client_key_file: needs upstream.client_cert_file")
        return self

    @field_validator("proxy")
    @classmethod
    def _proxy(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value()
        if text not in {"", DIRECT} and not is_proxy_url(text):
            raise ValueError(f'must be {PROXY_FORMS}, or "{DIRECT}"{explain_proxy_url(text)}')
        return value

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            well_formed = parts.port != 0 and not any(map(str.isspace, value))
        except ValueError:  # an incomplete IPv6 address, or a port that is not a number
            well_formed = False
        if not well_formed or parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("must be an http or https URL")
        if parts.path not in {"", "/"} or parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError("must be a scheme and a host, with an optional port and nothing else")
        return value

    @model_validator(mode="after")
    def _encrypted(self) -> Upstream:
        parts = urlsplit(self.endpoint)
        if parts.scheme == "http" and not self.allow_insecure and not is_loopback(parts.hostname or ""):
            raise ValueError(
                "endpoint: plain http needs a loopback address or upstream.allow_insecure = true"
            )
        return self


class Credentials(Section):
    """`credentials.*`: the active key pair and the next one, as values or as files."""

    access_key: SecretStr = SecretStr("")
    secret_key: SecretStr = SecretStr("")
    access_key_file: File = None
    secret_key_file: File = None
    next_access_key: SecretStr = SecretStr("")
    next_secret_key: SecretStr = SecretStr("")
    next_access_key_file: File = None
    next_secret_key_file: File = None

    @model_validator(mode="after")
    def _one_source(self) -> Credentials:
        for name in ("access_key", "secret_key", "next_access_key", "next_secret_key"):
            if getattr(self, name).get_secret_value() and getattr(self, f"{name}_file"):
                raise ValueError(f"{name}: set the value or the file, not both")
        return self


class Cache(Section):
    """`cache.*`: size of the cache, and lifetimes of its entries."""

    max_tasks: Count = 10_000
    max_bytes: Annotated[int, Field(ge=65_536, le=1_099_511_627_776)] = 67_108_864
    waiting_seconds: NotNegative = 2.0
    running_seconds: NotNegative = 1.0
    unknown_seconds: NotNegative = 1.0
    terminal_seconds: NotNegative = 600.0
    result_seconds: NotNegative = 30.0
    error_seconds: NotNegative = 1.0
    stale_while_revalidate_seconds: NotNegative = 2.0
    stale_if_error_seconds: NotNegative = 60.0

    @property
    def lifetimes(self) -> dict[Status | None, float]:
        """How long a snapshot is fresh, in seconds, by the status of the task; results are under None."""
        return {
            None: self.result_seconds,
            Status.WAITING: self.waiting_seconds,
            Status.RUNNING: self.running_seconds,
            Status.UNKNOWN: self.unknown_seconds,
            **{status: self.terminal_seconds for status in Status if status.terminal},
        }


class Watch(Section):
    """`watch.*`: event streams and long polls."""

    max_watchers: Count = 20_000
    heartbeat_seconds: AtLeastTenth = 15.0
    max_wait_seconds: Positive = 60.0
    unknown_task_seconds: NotNegative = 30.0


class Limits(Section):
    """`limits.*`: limits per request and per client; 0 disables a limit per client."""

    max_tasks_per_request: Annotated[int, Field(ge=1, le=10_000)] = 100
    max_body_bytes: Annotated[int, Field(ge=64, le=1_073_741_824)] = 65_536
    requests_per_second: Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)] = 0.0
    subscriptions_per_client: Annotated[int, Field(ge=0, le=10_000_000)] = 0


class Log(Section):
    """`log.*`: level and format of the log."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


class Settings(Section):
    """All settings, validated."""

    server: Server = Server()
    upstream: Upstream = Upstream()
    credentials: Credentials = Credentials()
    cache: Cache = Cache()
    watch: Watch = Watch()
    limits: Limits = Limits()
    store: Store = Store()
    log: Log = Log()


def is_proxy_url(text: str) -> bool:
    """Tell whether a text is the URL of an egress proxy.

    Behind the host, an "@" shows that a password has a character that must be escaped, such as "/".
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:  # an incomplete IPv6 address, or a port that is not a number
        return False
    rest = parts.path + parts.query + parts.fragment
    well_formed = port != 0 and "@" not in rest and not any(map(str.isspace, text))
    return well_formed and parts.scheme in _PROXY_SCHEMES and bool(parts.hostname)


def explain_proxy_url(text: str) -> str:
    """Return advice for a text that is no URL of a proxy: the end of a sentence, without the text."""
    scheme, separator, rest = text.partition("://")
    if separator and scheme in _PROXY_SCHEMES and "@" in rest:
        return '; in its password, write "@" as %40, "/" as %2F, "#" as %23 and "?" as %3F'
    return "" if separator or ":" not in text else "; the scheme is missing"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
