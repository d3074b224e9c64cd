"""Every setting: its name, its default, what is allowed.

    TOML file  <  SPEEDPIX_* (the vendor SDK's variables)  <  SD_GATEWAY_* variables

`load` merges the three, checks everything at once and tells all mistakes together. Durations
are float seconds. pydantic checks the values; the merging is ours, because pydantic-settings
stops at the first environment variable that it cannot parse and passes over unknown ones. What
pydantic finds wrong is put into words by `mistakes.py`.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from gateway.domain.printable import printable
from gateway.domain.task import Operation
from gateway.settings.error_messages import describe_errors
from gateway.settings.secret_files import read_secret

DEFAULT_FILE = Path("config/gateway.toml")
PREFIX = "SD_GATEWAY_"
_LONGEST_FILE = 1_048_576  # bytes; the complete config/gateway.toml has some 10,000
SPEEDPIX = {
    "SPEEDPIX_APP_KEY": ("credentials", "access_key"),
    "SPEEDPIX_APP_SECRET": ("credentials", "secret_key"),
    "SPEEDPIX_ENDPOINT": ("upstream", "endpoint"),
}


class SettingsError(Exception):
    """The settings are wrong: `mistakes` has one line for each."""

    def __init__(self, mistakes: list[str]) -> None:
        self.mistakes = [printable(mistake) for mistake in mistakes]
        super().__init__("\n".join(self.mistakes))


def _split(value: Any) -> Any:
    # A list in an environment variable: comma separated.
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _networks(value: list[str]) -> list[str]:
    for entry in value:
        if value != ["*"]:
            ipaddress.ip_network(entry)
    return value


Positive = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=86_400 * 30, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Port = Annotated[int, Field(ge=0, le=65_535)]
Strings = Annotated[list[str], BeforeValidator(_split)]
File = Annotated[Path | None, BeforeValidator(lambda value: value or None)]  # a blank variable is no folder
# A host without a port, an origin as browsers send it: what has another form would match nothing that comes.
Host = Annotated[str, Field(pattern=r"^(\*|(\*\.)?[^\s/?#@:*]+|\[[0-9a-fA-F:.]+\])$")]
Origin = Annotated[str, Field(pattern=r"^(\*|null|[a-z][a-z0-9+.-]*://[^\s/?#@*A-Z]+)$")]

VALKEY_PORT, SENTINEL_PORT = 6379, 26379
LOOPBACK_NAMES = ("localhost", "*.localhost", "127.0.0.1", "[::1]")
_URL_PATH = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@/-]*")  # RFC 3986, 3.3, without escapes
_STORE_SCHEMES = {"valkey", "valkeys", "redis", "rediss"}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Server(_Section):
    """`server.*`: where and how the gateway listens."""

    # Not empty: to a socket that is every address, and a variable that was left blank is no decision.
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Port = 8080
    metrics_port: Port = 0
    root_path: str = ""
    cors_origins: Annotated[list[Origin], BeforeValidator(_split)] = []
    edge: bool = True
    header_seconds: Positive = 10.0
    max_header_bytes: Annotated[int, Field(ge=1024, le=1_048_576)] = 32_768
    max_header_count: Annotated[int, Field(ge=10, le=10_000)] = 100
    keep_alive_seconds: Positive = 620.0
    max_connections: Count = 25_000
    trusted_hosts: Annotated[list[Host], BeforeValidator(_split)] = []
    trusted_proxies: Annotated[Strings, AfterValidator(_networks)] = ["127.0.0.1"]
    drain_seconds: Positive = 20.0

    @field_validator("root_path")
    @classmethod
    def _root_path(cls, value: str) -> str:
        if value and (not value.startswith("/") or value.endswith("/")):
            raise ValueError('must be empty, or begin with "/" and not end with it')
        if not _URL_PATH.fullmatch(value):
            raise ValueError("may have letters and digits of ASCII and -._~!$&'()*+,;=:@/ alone")
        return value

    @property
    def allowed_hosts(self) -> list[str]:
        """The Host values that are served: the setting, or else what suits the address that is listened on.

        A gateway on loopback serves loopback names only, so that a page whose name was made to lead to
        127.0.0.1 (DNS rebinding) cannot read from it. Any other gateway may have any name.
        """
        if self.trusted_hosts:
            return self.trusted_hosts
        return [*LOOPBACK_NAMES, self.host] if _is_loopback(self.host) else ["*"]


class Upstream(_Section):
    """`upstream.*`: whom the gateway calls, and within which bounds."""

    endpoint: str = "https://openai.edu-aliyun.com"
    allow_insecure: bool = False
    operations: Annotated[list[Operation], BeforeValidator(_split), Field(min_length=1)] = list(Operation)
    stage: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]*$")] = ""
    timeout_seconds: Positive = 10.0
    attempt_timeout_seconds: Positive = 5.0
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    max_in_flight: Annotated[int, Field(ge=1, le=10_000)] = 64
    requests_per_second: Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)] = 0.0
    max_response_bytes: Annotated[int, Field(ge=1024, le=1_073_741_824)] = 1_048_576
    connection_max_age_seconds: Positive = 300.0

    @model_validator(mode="after")
    def _endpoint(self) -> Upstream:
        try:
            parts = urlsplit(self.endpoint)
            well_formed = parts.port != 0 and not any(map(str.isspace, self.endpoint))
        except ValueError:  # half an IPv6 address, a port that is no number
            well_formed = False
        if not well_formed or parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("endpoint: must be an http or https URL")
        if parts.path not in {"", "/"} or parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError("endpoint: must be a scheme, a host and maybe a port, nothing more")
        if parts.scheme == "http" and not self.allow_insecure and not _is_loopback(parts.hostname):
            raise ValueError("endpoint: plain http only to loopback, unless upstream.allow_insecure = true")
        return self


class Credentials(_Section):
    """`credentials.*`: the access key and its secret, and those of the next pair, as values or as files."""

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


class Cache(_Section):
    """`cache.*`: for how long an answer counts."""

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


class Watch(_Section):
    """`watch.*`: event streams and long polls."""

    max_watchers: Count = 20_000
    heartbeat_seconds: Positive = 15.0
    max_wait_seconds: Positive = 60.0


class Limits(_Section):
    """`limits.*`: what one request may ask for, and one client. 0: no limit."""

    max_tasks_per_request: Annotated[int, Field(ge=1, le=10_000)] = 100
    max_body_bytes: Annotated[int, Field(ge=64, le=1_073_741_824)] = 65_536
    requests_per_second: Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)] = 0.0
    subscriptions_per_client: Annotated[int, Field(ge=0, le=10_000_000)] = 0


class Store(_Section):
    """`store.*`: the server through which replicas share, if any."""

    url: SecretStr = SecretStr("")
    username_file: File = None
    password_file: File = None
    ca_file: File = None
    sentinel_service: str = ""
    sentinel_username_file: File = None
    sentinel_password_file: File = None
    cluster: bool = False
    key_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9:._-]{1,64}$")] = "sd-gateway"
    timeout_seconds: Annotated[float, Field(gt=0, le=1)] = 0.05

    @model_validator(mode="after")
    def _url(self) -> Store:
        if not self.url.get_secret_value():
            return self
        try:
            parts, hosts = self._parts, self.hosts
        except ValueError:  # half an IPv6 address, a port that is no number
            parts, hosts = urlsplit(""), []
        well_formed = parts.scheme in _STORE_SCHEMES and all(host for host, _ in hosts)
        if not well_formed or parts.query or parts.fragment:
            raise ValueError("url: must be valkey://, valkeys://, redis:// or rediss:// and a host")
        if not re.fullmatch(r"(/[0-9]{0,5})?", parts.path) or (self.cluster and self.database):
            raise ValueError("url: its path may be a database's number, if it is no cluster")
        if self.cluster and self.sentinel_service:
            raise ValueError("cluster: not together with store.sentinel_service")
        if len(hosts) > 1 and not (self.cluster or self.sentinel_service):
            raise ValueError("url: several hosts only with store.cluster or store.sentinel_service")
        return self

    @property
    def _parts(self) -> SplitResult:
        return urlsplit(self.url.get_secret_value())

    @property
    def hosts(self) -> list[tuple[str, int]]:
        """The servers named: the one, or the first ones to ask about a cluster or for Sentinel's."""
        default = SENTINEL_PORT if self.sentinel_service else VALKEY_PORT
        hosts = [urlsplit(f"//{host}") for host in self._parts.netloc.rpartition("@")[2].split(",")]
        return [(host.hostname or "", host.port or default) for host in hosts]

    @property
    def tls(self) -> bool:
        """Whether connections are encrypted, and the server's certificate verified."""
        return self._parts.scheme in {"valkeys", "rediss"}

    @property
    def database(self) -> int:
        """The number of the database."""
        return int(self._parts.path.removeprefix("/") or 0)

    def login(self) -> tuple[str | None, str | None]:
        """Return user name and password, read from their files anew. Raises: OSError, ValueError."""
        user, _, password = map(unquote, self._parts.netloc.rpartition("@")[0].partition(":"))
        return _content(self.username_file) or user or None, _content(self.password_file) or password or None

    def sentinel_login(self) -> tuple[str | None, str | None]:
        """Return the Sentinels' user name and password, as `login` does."""
        return _content(self.sentinel_username_file) or None, _content(self.sentinel_password_file) or None


class Log(_Section):
    """`log.*`: how much is told, and in which form."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


class Settings(_Section):
    """All settings, checked."""

    server: Server = Server()
    upstream: Upstream = Upstream()
    credentials: Credentials = Credentials()
    cache: Cache = Cache()
    watch: Watch = Watch()
    limits: Limits = Limits()
    store: Store = Store()
    log: Log = Log()


def load(file: Path | None, environ: Mapping[str, str]) -> Settings:
    """Read the settings file (None: the default one, when it exists) and the environment over it.

    Raises: SettingsError with one line for every mistake.
    """
    if file is None:
        # A deleted folder has no file. One that may not be looked into may have one, which must count.
        try:
            file = DEFAULT_FILE if DEFAULT_FILE.exists() else None
        except OSError as exc:
            raise SettingsError([f"{DEFAULT_FILE}: cannot be looked for: {exc.strerror}"]) from exc
    # Python has bytes that are no UTF-8 as halves of surrogate pairs, which nothing can encode.
    if foreign := [name for name, value in environ.items() if _is_ours(name) and not _is_text(name + value)]:
        raise SettingsError([f"{name}: is not UTF-8" for name in foreign])
    values = _read_toml(file) if file is not None else {}
    for layer in (_speedpix(environ), _environment(environ)):
        _merge(values, layer)
    try:
        return Settings.model_validate(values)
    except ValidationError as exc:
        mistakes = exc.errors(include_url=False)
        raise SettingsError([describe_errors(each, Settings, of_all=PREFIX) for each in mistakes]) from None


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:  # maybe a pipe: `--config <(…)`
            content = opened.read(_LONGEST_FILE + 1)
        if len(content) > _LONGEST_FILE:
            raise SettingsError([f"{file}: is larger than {_LONGEST_FILE} bytes"])
        return tomllib.loads(content.decode())
    except OSError as exc:
        raise SettingsError([f"{file}: cannot be read: {exc.strerror}"]) from exc
    except UnicodeDecodeError as exc:
        raise SettingsError([f"{file}: is not TOML: not UTF-8 at byte {exc.start}"]) from exc
    except tomllib.TOMLDecodeError as exc:
        raise SettingsError([f"{file}: is not TOML: {exc}"]) from exc
    except RecursionError as exc:
        raise SettingsError([f"{file}: is not TOML: nested too deep"]) from exc


def _is_ours(variable: str) -> bool:
    return variable.startswith(PREFIX) or variable in SPEEDPIX


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _speedpix(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, (section, key) in SPEEDPIX.items():
        if value := environ.get(variable):
            values.setdefault(section, {})[key] = value
    return values


def _environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, value in sorted(environ.items()):
        if variable.startswith(PREFIX):
            section, _, key = variable.removeprefix(PREFIX).lower().partition("__")
            values.setdefault(section, {})[key] = value
    return values


def _merge(values: dict[str, Any], over: dict[str, Any]) -> None:
    for section, keys in over.items():
        target = values.setdefault(section, {})
        if not isinstance(target, dict):
            continue  # a section that is no table: validation names it
        # A secret's value and its file are one setting: the stronger source replaces both forms. All the
        # weaker ones go first, or of two forms in one source the second would silence the first.
        for key in keys if section == "credentials" else ():
            target.pop(key.removesuffix("_file") if key.endswith("_file") else f"{key}_file", None)
        target.update(keys)


def _content(file: Path | None) -> str:
    return "" if file is None else read_secret(file)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
