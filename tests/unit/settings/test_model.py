"""The settings: defaults, sources, and messages for configuration errors."""

import json
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr

from gateway.domain.task import Operation
from gateway.settings.errors import SettingsError
from gateway.settings.loading import load
from gateway.settings.model import OWN_PATHS, PROXY_FORMS, Settings
from gateway.settings.secret_text import InvalidSecret

Load = Callable[..., Settings]

# The published defaults. A change here must be announced in the release notes.
DEFAULTS: dict[str, Any] = {
    "server.host": "127.0.0.1",
    "server.port": 8080,
    "server.metrics_port": 0,
    "server.uds": "",
    "server.root_path": "",
    "server.cors_origins": [],
    "server.cors_headers": [],
    "server.cors_expose_headers": [],
    "server.cors_max_age_seconds": 600,
    "server.cors_credentials": False,
    "server.cors_private_network": True,
    "server.edge": True,
    "server.header_seconds": 10.0,
    "server.max_header_bytes": 32768,
    "server.max_header_count": 100,
    "server.keep_alive_seconds": 620.0,
    "server.max_connections": 25000,
    "server.trusted_hosts": [],
    "server.trusted_proxies": ["127.0.0.1"],
    "server.client_address_headers": ["X-Forwarded-For", "Forwarded", "X-Real-IP"],
    "server.drain_seconds": 20.0,
    "upstream.endpoint": "https://openai.edu-aliyun.com",
    "upstream.allow_insecure": False,
    "upstream.operations": ["sd_get_progress", "comfy_get_progress", "sd_get_result", "comfy_get_result"],
    "upstream.stage": "",
    "upstream.timeout_seconds": 10.0,
    "upstream.attempt_timeout_seconds": 5.0,
    "upstream.retries": 2,
    "upstream.max_in_flight": 64,
    "upstream.requests_per_second": 0.0,
    "upstream.max_response_bytes": 1048576,
    "upstream.connection_max_age_seconds": 300.0,
    "upstream.proxy": SecretStr(""),
    "upstream.ca_file": None,
    "upstream.client_cert_file": None,
    "upstream.client_key_file": None,
    "cache.max_tasks": 10000,
    "cache.max_bytes": 67108864,
    "cache.waiting_seconds": 2.0,
    "cache.running_seconds": 1.0,
    "cache.unknown_seconds": 1.0,
    "cache.terminal_seconds": 600.0,
    "cache.result_seconds": 30.0,
    "cache.error_seconds": 1.0,
    "cache.stale_while_revalidate_seconds": 2.0,
    "cache.stale_if_error_seconds": 60.0,
    "watch.max_watchers": 20000,
    "watch.heartbeat_seconds": 15.0,
    "watch.max_wait_seconds": 60.0,
    "watch.unknown_task_seconds": 30.0,
    "limits.max_tasks_per_request": 100,
    "limits.max_body_bytes": 65536,
    "limits.requests_per_second": 0.0,
    "limits.subscriptions_per_client": 0,
    "store.url": SecretStr(""),
    "store.username_file": None,
    "store.password_file": None,
    "store.ca_file": None,
    "store.client_cert_file": None,
    "store.client_key_file": None,
    "store.sentinel_service": "",
    "store.sentinel_username_file": None,
    "store.sentinel_password_file": None,
    "store.cluster": False,
    "store.key_prefix": "sd-gateway",
    "store.timeout_seconds": 0.05,
    "log.level": "info",
    "log.format": "json",
}


SECRETS = ["access_key", "secret_key", "next_access_key", "next_secret_key"]


def leaves(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting's dotted name and value."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.fixture
def read(tmp_path: Path) -> Load:
    """Return a function that loads settings from TOML text and environment variables."""

    def read(toml: str = "", **environ: str) -> Settings:
        file = tmp_path / "settings.toml"
        file.write_text(toml, encoding="utf-8")
        return load(file, environ)

    return read


@pytest.fixture
def mistakes(read: Load, tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that loads invalid settings and returns the lines of the error, without sources."""

    def mistakes(toml: str = "", **environ: str) -> list[str]:
        with pytest.raises(SettingsError) as caught:
            read(toml, **environ)
        lines = caught.value.mistakes
        assert str(caught.value).splitlines() == lines, "each error has one line"
        file = re.escape(str(tmp_path / "settings.toml"))
        sources = [re.match(rf"(?:{file}(?::\d+)*|{'|'.join(environ) or file}): ", line) for line in lines]
        assert all(sources), f"each line begins with its source: {lines}"
        return [line[source.end() :] for line, source in zip(lines, sources, strict=True) if source]

    return mistakes


# Texts as people write them


TOML = """
[server]
host = "\ufeff 127.0.0.9\\n"
port = " 81\\n"
edge = "false\\r\\n"
trusted_hosts = ["a.example.com"]
[upstream]
endpoint = "http://127.0.0.1:9 "
[store]
password_file = "/run/password\\n"
"""


def test_texts_lose_white_space_and_byte_order_marks(read: Load) -> None:
    """In every setting, from the file or a variable, blanks at the ends are no part of the value."""
    variables = {
        "SD_GATEWAY_SERVER__HOST": "\ufeff 127.0.0.9\n",
        "SD_GATEWAY_SERVER__PORT": "81\r\n",
        "SD_GATEWAY_SERVER__EDGE": "false\n",
        "SD_GATEWAY_SERVER__TRUSTED_HOSTS": " a.example.com\n",
        "SPEEDPIX_ENDPOINT": "http://127.0.0.1:9\n",
        "SD_GATEWAY_STORE__PASSWORD_FILE": "/run/password\n",
    }
    for settings in (read(TOML), read(**variables)):
        assert (settings.server.host, settings.server.port, settings.server.edge) == ("127.0.0.9", 81, False)
        assert settings.server.trusted_hosts == ["a.example.com"]
        assert settings.upstream.endpoint == "http://127.0.0.1:9"
        assert settings.store.password_file == Path("/run/password")


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("the-\nsecret", "contains a line break"),
        ("the-\x07secret", "contains a control character (U+0007)"),
        ("the-secret\u200b", "ends with an invisible character (U+200B)"),
    ],
)
def test_secrets_that_cannot_be_meant_are_refused(
    mistakes: Callable[..., list[str]], name: str, text: str, says: str
) -> None:
    """The message names the setting and not the secret, for a variable and for the file."""
    expected = f"credentials.{name} = (hidden): {says}"
    for lines in (
        mistakes(f"[credentials]\n{name} = {json.dumps(text)}"),
        mistakes(**{f"SD_GATEWAY_CREDENTIALS__{name.upper()}": text}),
    ):
        [line] = lines
        assert line.endswith(expected)
        assert "the-" not in line


# Defaults and sources


def test_settings_have_the_published_defaults() -> None:
    """Except for the credentials, the settings and their defaults are the published ones."""
    assert {n: v for n, v in leaves(Settings()) if not n.startswith("credentials.")} == DEFAULTS


def test_settings_have_no_credentials_by_default() -> None:
    """By default there are no credentials and no credential files."""
    credentials = Settings().credentials
    assert [getattr(credentials, name).get_secret_value() for name in SECRETS] == [""] * 4
    assert [getattr(credentials, f"{name}_file") for name in SECRETS] == [None] * 4


def test_load_returns_the_defaults_for_an_empty_file_and_environment(read: Load) -> None:
    """Without settings the defaults apply; other environment variables are ignored."""
    assert read() == Settings()
    assert read(PATH="/bin", HOME="/root", SD_GATEWAYX="1", sd_gateway_foo="1") == Settings()


def test_load_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a file and without the default file, only the environment is used."""
    monkeypatch.chdir(tmp_path)
    assert load(None, {}) == Settings()
    assert load(None, {"SD_GATEWAY_SERVER__PORT": "1"}).server.port == 1


def test_load_reads_the_default_file_when_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config/gateway.toml is read only if no other file is given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "gateway.toml").write_text("[server]\nport = 1\n")
    other = tmp_path / "other.toml"
    other.write_text("[server]\nhost = 'h'\n")
    assert load(None, {}).server.port == 1
    assert (load(other, {}).server.port, load(other, {}).server.host) == (8080, "h")


def test_load_prefers_the_environment_to_the_file(read: Load) -> None:
    """A variable overrides the file key by key: other keys of the section stay."""
    settings = read("[server]\nport = 1\nhost = 'file'\n[log]\nlevel = 'debug'", SD_GATEWAY_SERVER__PORT="2")
    assert (settings.server.port, settings.server.host, settings.log.level) == (2, "file", "debug")


def test_load_ranks_the_sdks_variables_between(read: Load) -> None:
    """SPEEDPIX_* overrides the file, SD_GATEWAY_* overrides both; an empty SPEEDPIX_* is ignored."""
    credentials = "[credentials]\naccess_key = 'file-key'\nsecret_key = 'file-secret'"
    toml = f"{credentials}\n[upstream]\nendpoint = 'https://file'"
    speedpix = {
        "SPEEDPIX_APP_KEY": "sdk-key",
        "SPEEDPIX_APP_SECRET": "sdk-secret",
        "SPEEDPIX_ENDPOINT": "https://sdk",
    }

    def values(settings: Settings) -> tuple[str, str, str]:
        pair = settings.credentials
        return (
            settings.upstream.endpoint,
            pair.access_key.get_secret_value(),
            pair.secret_key.get_secret_value(),
        )

    assert values(read(toml, **dict.fromkeys(speedpix, ""))) == ("https://file", "file-key", "file-secret")
    assert values(read(toml, **speedpix)) == ("https://sdk", "sdk-key", "sdk-secret")
    ours = {"SD_GATEWAY_UPSTREAM__ENDPOINT": "https://ours", "SD_GATEWAY_CREDENTIALS__ACCESS_KEY": "our-key"}
    assert values(read(toml, **speedpix, **ours)) == ("https://ours", "our-key", "sdk-secret")


@pytest.mark.parametrize(
    ("value", "items"),
    [("a", ["a"]), ("a,b", ["a", "b"]), (" a , b ,", ["a", "b"]), ("", []), (",", []), ("*", ["*"])],
)
def test_load_splits_lists_in_the_environment(read: Load, value: str, items: list[str]) -> None:
    """A list in the environment is comma separated; spaces around an item are ignored."""
    origins = re.sub(r"\w", r"https://\g<0>", value)
    loaded = read(SD_GATEWAY_SERVER__CORS_ORIGINS=origins).server.cors_origins
    assert loaded == [item.replace("a", "https://a").replace("b", "https://b") for item in items]


def test_load_reads_every_kind_of_value_from_the_environment(read: Load) -> None:
    """Numbers, booleans, operations and paths are parsed from text."""
    settings = read(
        SD_GATEWAY_UPSTREAM__OPERATIONS="sd_get_progress,sd_get_result",
        SD_GATEWAY_UPSTREAM__ALLOW_INSECURE="true",
        SD_GATEWAY_UPSTREAM__TIMEOUT_SECONDS="0.5",
        SD_GATEWAY_UPSTREAM__RETRIES="0",
        SD_GATEWAY_CREDENTIALS__ACCESS_KEY_FILE="/run/key",
    )
    assert settings.upstream.operations == [Operation.SD_GET_PROGRESS, Operation.SD_GET_RESULT]
    assert settings.upstream.allow_insecure is True
    assert (settings.upstream.timeout_seconds, settings.upstream.retries) == (0.5, 0)
    assert settings.credentials.access_key_file == Path("/run/key")


def test_settings_cannot_be_changed() -> None:
    """Settings are immutable."""
    with pytest.raises(ValueError, match="frozen"):
        Settings().server.port = 1  # type: ignore[misc]


# Secrets by value and by file


@pytest.mark.parametrize("name", SECRETS)
def test_load_overrides_a_secret_in_either_form(read: Load, name: str) -> None:
    """The value and the file of a secret are one setting: the source with precedence replaces both."""
    value = f"[credentials]\n{name} = 'value'"
    file = f"[credentials]\n{name}_file = 'file'"
    by_file = read(value, **{f"SD_GATEWAY_CREDENTIALS__{name}_file".upper(): "/f"}).credentials
    assert (getattr(by_file, name).get_secret_value(), getattr(by_file, f"{name}_file")) == ("", Path("/f"))
    by_value = read(file, **{f"SD_GATEWAY_CREDENTIALS__{name}".upper(): "v"}).credentials
    assert (getattr(by_value, name).get_secret_value(), getattr(by_value, f"{name}_file")) == ("v", None)


def test_load_ignores_an_empty_file_name(read: Load) -> None:
    """An empty variable sets no file, and does not conflict with a value."""
    names = ("CREDENTIALS__ACCESS_KEY", "CREDENTIALS__NEXT_SECRET_KEY", "STORE__PASSWORD", "STORE__CA")
    blank = {f"SD_GATEWAY_{name}_FILE": "" for name in names}
    assert read(**blank) == Settings()
    value = {"SD_GATEWAY_CREDENTIALS__ACCESS_KEY": "key"}
    assert read(**blank, **value).credentials.access_key.get_secret_value() == "key"


def test_load_overrides_a_file_with_an_sdks_variable(read: Load) -> None:
    """SPEEDPIX_APP_KEY replaces the file in the TOML; a file in an SD_GATEWAY_* variable replaces both."""
    toml = "[credentials]\naccess_key_file = 'file'"
    assert read(toml, SPEEDPIX_APP_KEY="v").credentials.access_key_file is None
    environ = {"SPEEDPIX_APP_KEY": "v", "SD_GATEWAY_CREDENTIALS__ACCESS_KEY_FILE": "/f"}
    assert read(toml, **environ).credentials.access_key_file == Path("/f")


@pytest.mark.parametrize("name", SECRETS)
def test_load_rejects_a_secret_and_its_file_in_one_source(
    mistakes: Callable[..., list[str]], name: str
) -> None:
    """A value and a file for the same secret in one source is an error."""
    line = f"credentials.{name} = (hidden): set the value or the file, not both"
    assert mistakes(f"[credentials]\n{name} = 'hush-hush'\n{name}_file = 'file'") == [line]
    variable = f"SD_GATEWAY_CREDENTIALS__{name}".upper()
    assert mistakes(**{variable: "hush-hush", f"{variable}_FILE": "file"}) == [line]


def test_settings_show_no_secret(read: Load) -> None:
    """repr, str and dumps of settings show no secret."""
    settings = read("[credentials]\naccess_key = 'hush-key'\nsecret_key = 'hush-secret'")
    for shown in (repr(settings), str(settings), repr(settings.model_dump()), settings.model_dump_json()):
        assert "hush" not in shown


# Errors


@pytest.mark.parametrize(
    ("toml", "line"),
    [
        ("[server]\nport = 'x'", 'server.port = "x": must be a whole number from 0 to 65535'),
        ("[server]\nport = 65536", "server.port = 65536: must be a whole number from 0 to 65535"),
        ("[server]\nport = -1", "server.port = -1: must be a whole number from 0 to 65535"),
        ("[server]\nport = true", "server.port = true: must be a whole number from 0 to 65535"),
        ("[server]\nport = [1]", "server.port = [1]: must be a whole number from 0 to 65535"),
        ("[server]\nport = 2026-01-01", "server.port = 2026-01-01: must be a whole number from 0 to 65535"),
        ("[server.port]\nx = 1", "server.port = {x = 1}: must be a whole number from 0 to 65535"),
        (
            "[server]\nmetrics_port = 8080",
            "server.metrics_port = 8080: must differ from server.port; 0 serves",
        ),
        ("[server]\nhost = 1", "server.host = 1: must be a host name or an IP address"),
        ("[server]\nhost = ''", 'server.host = "": must be a host name or an IP address'),
        ("[server]\ntrusted_hosts = 1", "server.trusted_hosts = 1: must be a list"),
        (
            "[server]\ntrusted_hosts = [1]",
            "server.trusted_hosts[0] = 1: must be a host without scheme and port",
        ),
        (
            "[server]\ntrusted_proxies = ['proxy']",
            'server.trusted_proxies = ["proxy"]: "proxy" is not an address or a network such as 10.0.0.0/8',
        ),
        (
            "[server]\ntrusted_proxies = ['10.0.0.1/8']",
            'server.trusted_proxies = ["10.0.0.1/8"]: "10.0.0.1/8" is an address within a network; ',
        ),
        (
            "[server]\ntrusted_proxies = ['*', '10.0.0.1']",
            'server.trusted_proxies = ["*", "10.0.0.1"]: "*" must be the only item',
        ),
        (
            "[server]\ndrain_seconds = 0",
            "server.drain_seconds = 0: must be a number above 0 and at most 86400",
        ),
        (
            "[server]\ndrain_seconds = nan",
            "server.drain_seconds = nan: must be a number above 0 and at most 86400",
        ),
        ("[server]\ndrain_seconds = true", "server.drain_seconds = true: must be a number above 0 and at"),
        (
            "[watch]\nheartbeat_seconds = 1e-9",
            "watch.heartbeat_seconds = 1e-09: must be a number from 0.1 to 86400",
        ),
        (
            "[upstream]\ntimeout_seconds = 0.05",
            "upstream.timeout_seconds = 0.05: must be a number from 0.1 to",
        ),
        ("[cache]\nerror_seconds = inf", "cache.error_seconds = inf: must be a number from 0 to 2592000"),
        ("[cache]\nerror_seconds = -0.1", "cache.error_seconds = -0.1: must be a number from 0 to 2592000"),
        ("[cache]\nerror_seconds = '5s'", 'cache.error_seconds = "5s": must be a number from 0 to 2592000'),
        ("[cache]\nmax_tasks = 0", "cache.max_tasks = 0: must be a whole number from 1 to 10000000"),
        (
            "[cache]\nmax_bytes = 1",
            "cache.max_bytes = 1: must be a whole number from 65536 to 1099511627776",
        ),
        ("[upstream]\nretries = 1.5", "upstream.retries = 1.5: must be a whole number from 0 to 10"),
        ("[upstream]\nretries = 11", "upstream.retries = 11: must be a whole number from 0 to 10"),
        (
            "[upstream]\noperations = ['x']",
            'upstream.operations[0] = "x": must be sd_get_progress, comfy_get_progress, sd_get_result or ',
        ),
        ("[upstream]\noperations = []", "upstream.operations = []: must be a list that is not empty"),
        ("[upstream]\nstage = 'a b'", 'upstream.stage = "a b": must be empty, or letters, digits, _ and -'),
        ('[upstream]\nstage = "A\\nB"', 'upstream.stage = "A\\nB": must be empty, or letters, digits, _'),
        (
            "[upstream]\nallow_insecure = 'perhaps'",
            'upstream.allow_insecure = "perhaps": must be true or false',
        ),
        ("[server]\nedge = 2.5", "server.edge = 2.5: must be true or false"),
        ("[log]\nlevel = 'loud'", 'log.level = "loud": must be debug, info, warning or error'),
        ("[log]\nformat = 'xml'", 'log.format = "xml": must be json or console'),
        ("server = 5", "server = 5: must be a section: [server]"),
        ("[[log]]\nlevel = 'info'", 'log = [{level = "info"}]: must be a section: [log]'),
        ("[credentials]\naccess_key = 123456", "credentials.access_key = (hidden): must be text"),
        ("[store]\nca_file = 1", "store.ca_file = 1: must be a file name"),
    ],
)
def test_load_reports_a_bad_value(mistakes: Callable[..., list[str]], toml: str, line: str) -> None:
    """The line for a bad value has the key, the value and the allowed values."""
    [message] = mistakes(toml)
    assert message.startswith(line)


def test_load_shortens_a_long_value(mistakes: Callable[..., list[str]]) -> None:
    """An error shows the first 100 characters of a value."""
    [message] = mistakes(f"[server]\nport = '{'x' * 5000}'")
    assert message == f'server.port = "{"x" * 99}…: must be a whole number from 0 to 65535'


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("SD_GATEWAY_SERVER__PORT", "", 'server.port = "": must be a whole number from 0 to 65535'),
        ("SD_GATEWAY_SERVER__PORT", "eighty", 'server.port = "eighty": must be a whole number'),
        ("SD_GATEWAY_SERVER__PORT", "1\n2", r'server.port = "1\n2": must be a whole number'),
        ("SD_GATEWAY_SERVER__EDGE", "maybe", 'server.edge = "maybe": must be true or false'),
        (
            "SD_GATEWAY_UPSTREAM__OPERATIONS",
            "sd_get_progress,x",
            'upstream.operations[1] = "x": must be sd_get_',
        ),
        ("SPEEDPIX_ENDPOINT", "nowhere", 'upstream.endpoint = "nowhere": must be an http or https URL'),
        ("SD_GATEWAY_FOO", "1", "unknown setting; known: SD_GATEWAY_SERVER__…, SD_GATEWAY_UPSTREAM__…, "),
        ("SD_GATEWAY_SERVER", "1", "unknown setting; known: SD_GATEWAY_SERVER__ and HOST, PORT, "),
        ("SD_GATEWAY_SERVER__FOO", "1", "unknown setting; known: SD_GATEWAY_SERVER__ and HOST, PORT, "),
        ("SD_GATEWAY_SERVER__PROT", "1", "unknown setting; did you mean SD_GATEWAY_SERVER__PORT?"),
        ("SD_GATEWAY_SERVER__PORT__X", "1", "unknown setting; did you mean SD_GATEWAY_SERVER__PORT?"),
        ("SD_GATEWAY_UPSTRAEM__RETRIES", "1", "unknown setting; did you mean SD_GATEWAY_UPSTREAM__RETRIES?"),
        ("SD_GATEWAY_SERVER_PORT", "8080", "unknown setting; did you mean SD_GATEWAY_SERVER__PORT?"),
        ("SD_GATEWAY_PORT", "8080", "unknown setting; did you mean SD_GATEWAY_SERVER__PORT?"),
        (
            "SD_GATEWAY_SECRET_KEY",
            "s3cret",
            "unknown setting; did you mean SD_GATEWAY_CREDENTIALS__SECRET_KEY?",
        ),
        (
            "SD_GATEWAY_REQUESTS_PER_SECOND",
            "5",
            "unknown setting; did you mean SD_GATEWAY_UPSTREAM__REQUESTS_PER_SECOND or SD_GATEWAY_LIMITS__",
        ),
        ("SD_GATEWAY_LOG_LEVLE", "info", "unknown setting; did you mean SD_GATEWAY_LOG__LEVEL?"),
        ("SD_GATEWAY_", "1", "unknown setting; known: SD_GATEWAY_SERVER__…, "),
        ("SD_GATEWAY_LOG__LEVEL", "\udcff", "is not UTF-8"),
    ],
)
def test_load_reports_an_error_in_the_environment(
    mistakes: Callable[..., list[str]], variable: str, value: str, line: str
) -> None:
    """A variable with a bad value or for an unknown setting is reported like an error in the file."""
    [message] = mistakes(**{variable: value})
    assert message.startswith(line)
    assert "s3cret" not in message


@pytest.mark.parametrize(
    ("toml", "line"),
    [
        ("[server]\nprot = 1", "server.prot: unknown setting; did you mean server.port?"),
        ("[server]\nPort = 1", "server.Port: unknown setting; did you mean server.port?"),
        ("[server]\ndrain-seconds = 1", "server.drain-seconds: unknown setting; did you mean server.drain_s"),
        ("[server]\nretries = 1", "server.retries: unknown setting; did you mean upstream.retries?"),
        ("[server]\nmax_watcher = 1", "server.max_watcher: unknown setting; did you mean "),
        ("[server.tls]\ncert = 'hush'", "server.tls: unknown setting; known: host, port, "),
        ("[serve]\nport = 1", "serve: unknown section; did you mean [server]?"),
        ("[a.b.c]\nd = 'hush'", "a: unknown section; known: server, upstream, credentials, "),
        ("port = 1", "port: unknown setting; did you mean server.port?"),
        ("colour = 'hush'", "colour: unknown section; known: server, upstream, credentials, "),
        ("[log]\nxyz = 1", "log.xyz: unknown setting; known: level, format"),
        ("[credentials]\nsecret_kye = 'hush'", "credentials.secret_kye: unknown setting; did you mean cred"),
    ],
)
def test_load_reports_an_unknown_key(mistakes: Callable[..., list[str]], toml: str, line: str) -> None:
    """The line for an unknown key suggests a similar one or lists all; its value is not shown."""
    [message] = mistakes(toml)
    assert message.startswith(line)
    assert "hush" not in message


def test_load_reports_a_section_that_is_not_a_table(mistakes: Callable[..., list[str]]) -> None:
    """A section that is a number is reported even if the environment has keys for it."""
    [message] = mistakes("server = 5", SD_GATEWAY_SERVER__PORT="1")
    assert message == "server = 5: must be a section: [server]"


def test_load_reports_all_errors_at_once(mistakes: Callable[..., list[str]]) -> None:
    """Errors in the file and in the environment are reported together, one line each."""
    lines = mistakes(
        "[server]\nport = 'x'\nprot = 1\n[upstream]\nendpoint = 'ftp://x'\n[cash]\na = 1",
        SD_GATEWAY_LOG__LEVEL="loud",
        SD_GATEWAY_CACHE__MAX_TASKS="0",
        SD_GATEWAY_CREDENTIALS__ACCESS_KEY="k",
        SD_GATEWAY_CREDENTIALS__ACCESS_KEY_FILE="f",
    )
    names = {re.split(" = |: ", line)[0] for line in lines}
    assert names == {
        "server.port",
        "server.prot",
        "upstream.endpoint",
        "cash",
        "log.level",
        "cache.max_tasks",
        "credentials.access_key",
    }
    assert len(lines) == len(names)


@pytest.mark.parametrize(
    "toml",
    [
        "credentials = 'hush-hush'",
        "[[credentials]]\nsecret_key = 'hush-hush'",
        "[credentials]\nsecret_key = ['hush-hush']",
        "[credentials]\nsecret_key = {value = 'hush-hush'}",
        "[credentials]\naccess_key_file = {value = 'hush-hush'}",
        "[credentials]\nsecret_key = 'hush-hush'\nsecret_key_file = 'file'\naccess_key = 1",
        "[credentials.secret_key]\nhush = 'hush-hush'",
        "[upstream]\nendpoint = 'https://user:hush-hush@host'",
        "[upstream]\nendpoint = 'https://:hush-hush@host'",
        "[credentials]\nsecret_key = 'hush-hush",
    ],
)
def test_load_shows_no_secret_in_errors(mistakes: Callable[..., list[str]], toml: str) -> None:
    """No error message contains a secret."""
    assert "hush" not in "\n".join(mistakes(toml))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"port", ':1:5: is not TOML: expected "=" after the key'),
        (b"server:\n  port: 1", ':1:7: is not TOML: expected "=" after the key'),
        (b"[log]\nlevel = info", ":2:12: is not TOML: unexpected text after the value; text needs quotes"),
        (b"[server]\nhost = 127.0.0.1", ":2:13: is not TOML: unexpected text after the value; text needs "),
        (b"[server]\nedge = True", ":2:8: is not TOML: not a value; text needs quotes, and a truth value is"),
        (b'[server]\nhost = "a\nport = 1', ":2:10: is not TOML: the text has no closing quote"),
        (b"[server]\nhost = 'a\nport = 1", ":2:1: is not TOML: the text has no closing quote"),
        (b'a = """\n\nb', ":1:1: is not TOML: the text has no closing quote"),
        (b"[server]\ntrusted_hosts = [\n'a'\n", ':2:1: is not TOML: the list has no closing "]"'),
        (b"[server]\ntrusted_hosts = [\n'a',\n", ":2:1: is not TOML: the value is not complete"),
        (b"# a\n\n  a = {b = 1", ":3:13: is not TOML: the inline table has no closing"),
        (b"[server\nport = 1", ':1:8: is not TOML: the header has no closing "]"'),
        (b'[log]\nlevel = "C:\\x"', ':2:14: is not TOML: a backslash in "…" begins an escape'),
        (b"[server]\nport = 2026-02-30", ":2:8: is not TOML: there is no such date or time"),
        (b"[server]\nport = 1\nport = 2", ":3:1: is not TOML: server.port is already set in line 2"),
        (b"[log]\n[server]\n[log]", ":3:1: is not TOML: log is already set in line 1"),
        (b"[[log]]\nlevel = 'info'\n\n  [log]", ":4:3: is not TOML: log is already set in line 1"),
        (b"server = {port = 1}\n[server]\nhost = 'h'", ":2:1: is not TOML: server is already set in line 1"),
        (b"server = {port = 1, port = 2}", ":1:29: is not TOML: the key is set twice in the inline table"),
        (b"server = {port = {}, port.a = 2}", ":1:1: is not TOML: a key is set twice"),
        (b"\nport = " + b"9" * 5000, ":2: is not TOML: a number has too many digits"),
        (b"\n = 1", ":2:2: is not TOML: not a statement: expected [section] or key = value"),
        (b"[server]\nhost = '\0'", ":2:9: is not TOML: found invalid character"),
        (b"[server]\nhost = '\xff'", ":2:9: is not TOML: not UTF-8; save it as UTF-8"),
        ("[server]".encode("utf-16"), ": is not TOML: UTF-16; save it as UTF-8"),
        (b"a = " + b"[" * 50_000, ": is not TOML: nested too deep"),
    ],
)
def test_load_reports_a_file_that_is_not_toml(tmp_path: Path, content: bytes, line: str) -> None:
    """A file that is not TOML or not UTF-8 is one line with the position and the likely cause."""
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load(file, {})
    [message] = caught.value.mistakes
    assert message.startswith(f"{file}{line}")
    assert "\n" not in message


def test_load_reports_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A given file that is missing or a directory is one line with the reason."""
    with pytest.raises(SettingsError) as caught:
        load(tmp_path / "none.toml", {})
    assert caught.value.mistakes == [f"{tmp_path / 'none.toml'}: cannot be read: No such file or directory"]
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, {})
    assert caught.value.mistakes == [f"{tmp_path}: cannot be read: Is a directory"]


def test_load_rejects_an_endless_file() -> None:
    """An endless file is rejected once it exceeds the maximum size."""
    with pytest.raises(SettingsError) as caught:
        load(Path("/dev/zero"), {})
    assert caught.value.mistakes == ["/dev/zero: is larger than 1048576 bytes"]


# Semantic checks


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://openai.edu-aliyun.com",
        "https://host:8443/",
        "HTTPS://HOST",
        "http://localhost:8081",
        "http://127.0.0.1",
        "http://127.1.2.3:1",
        "http://[::1]:8081",
    ],
)
def test_load_accepts_an_endpoint(read: Load, endpoint: str) -> None:
    """An endpoint may have any host over https, and a loopback host over plain http."""
    assert read(f"[upstream]\nendpoint = '{endpoint}'").upstream.endpoint == endpoint


@pytest.mark.parametrize(
    ("endpoint", "allowed"),
    [
        ("", "must be an http or https URL"),
        ("openai.edu-aliyun.com", "must be an http or https URL"),
        ("ftp://host", "must be an http or https URL"),
        ("https://", "must be an http or https URL"),
        ("https://:443", "must be an http or https URL"),
        ("https://[::1", "must be an http or https URL"),
        ("https://host:port", "must be an http or https URL"),
        ("https://host:65536", "must be an http or https URL"),
        ("https://host name", "must be an http or https URL"),
        ("https://host/path", "must be a scheme and a host, with an optional port and nothing else"),
        ("https://host?query", "must be a scheme and a host, with an optional port and nothing else"),
        ("https://host#fragment", "must be a scheme and a host, with an optional port and nothing else"),
        ("http://host", "plain http needs a loopback address or upstream.allow_insecure = true"),
        ("http://10.0.0.1", "plain http needs a loopback address or upstream.allow_insecure = true"),
        (
            "http://localhost.example.com",
            "plain http needs a loopback address or upstream.allow_insecure = true",
        ),
        (
            "http://127.0.0.1.example.com",
            "plain http needs a loopback address or upstream.allow_insecure = true",
        ),
    ],
)
def test_load_rejects_an_endpoint(mistakes: Callable[..., list[str]], endpoint: str, allowed: str) -> None:
    """An endpoint with more than scheme, host and port, or with plain http to another host, is an error."""
    assert mistakes(f"[upstream]\nendpoint = '{endpoint}'") == [
        f'upstream.endpoint = "{endpoint}": {allowed}'
    ]


def test_load_allows_plain_http_if_configured(read: Load) -> None:
    """upstream.allow_insecure permits plain http to any host."""
    toml = "[upstream]\nendpoint = 'http://10.0.0.1'\nallow_insecure = true"
    assert read(toml).upstream.endpoint == "http://10.0.0.1"


@pytest.mark.parametrize(
    "host", ["*", "a", "a.example.com", "*.example.com", "10.0.0.1", "[::1]", "画.example"]
)
def test_load_accepts_a_host_to_trust(read: Load, host: str) -> None:
    """A host name, all its subdomains, an address, or any host."""
    assert read(SD_GATEWAY_SERVER__TRUSTED_HOSTS=host).server.trusted_hosts == [host]


@pytest.mark.parametrize("host", ["https://a", "a:8080", "a/b", "*a", "a.*", "[::1]:80", "a b"])
def test_load_rejects_a_host_that_matches_no_request(mistakes: Callable[..., list[str]], host: str) -> None:
    """A value that no Host header has, without its port, is an error: it would never match."""
    [message] = mistakes(SD_GATEWAY_SERVER__TRUSTED_HOSTS=host)
    assert message.startswith(f'server.trusted_hosts[0] = "{host}": must be a host without scheme and port')


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "null",
        "https://a.example.com",
        "http://127.0.0.1:8080",
        "app://a",
        "https://*.example.com",
        "https://*.example.com:8443",
        "http://localhost:*",
        "http://*.localhost:*",
        "http://[::1]:8080",
    ],
)
def test_load_accepts_an_origin(read: Load, origin: str) -> None:
    """A scheme and a host with an optional port, all subdomains, all ports, or any origin."""
    assert read(SD_GATEWAY_SERVER__CORS_ORIGINS=origin).server.cors_origins == [origin]


@pytest.mark.parametrize(
    "origin",
    ["a.example.com", "https://a/", "https://A", "https://*", "https://a.*", "https://*a", "https://"],
)
def test_load_rejects_an_origin_that_no_browser_sends(
    mistakes: Callable[..., list[str]], origin: str
) -> None:
    """A value that no browser sends as an origin is an error: it would never match."""
    [message] = mistakes(SD_GATEWAY_SERVER__CORS_ORIGINS=origin)
    assert message.startswith(f'server.cors_origins[0] = "{origin}": must be an origin in lower case')


@pytest.mark.parametrize("origin", ["*", "null", "https://a.example.com,*"])
def test_load_refuses_credentials_of_any_origin(mistakes: Callable[..., list[str]], origin: str) -> None:
    """`cors_credentials` needs the names of the origins: otherwise any page could use the user's login."""
    [message] = mistakes(SD_GATEWAY_SERVER__CORS_ORIGINS=origin, SD_GATEWAY_SERVER__CORS_CREDENTIALS="true")
    assert message.startswith("server.cors_credentials = ")
    assert 'cannot be combined with "*" or "null" in server.cors_origins' in message


@pytest.mark.parametrize(
    "path", ["/v1", "/v1/progress", "/v1/events/a", "/scc", "/scc/sd_get_result", "/metrics", "/web/a"]
)
def test_load_rejects_a_root_path_that_hides_the_api(mistakes: Callable[..., list[str]], path: str) -> None:
    """With such a prefix, a path of the API would have two meanings."""
    line = f'server.root_path = "{path}": must not hide a path of the gateway itself: /'
    assert mistakes(SD_GATEWAY_SERVER__ROOT_PATH=path)[0].startswith(line)


def test_own_paths_are_those_of_the_api() -> None:
    """Every path of the OpenAPI document but that of the page is known to `server.root_path`."""
    paths = json.loads(files("gateway.api").joinpath("openapi.json").read_bytes())["paths"]
    assert {"/v1/events", "/readyz"} <= paths.keys()
    for path in paths.keys() - {"/"}:
        assert any(f"{path}/".startswith(f"{own}/") for own in OWN_PATHS), path


@pytest.mark.parametrize("path", ["//a", "/a//b", "/.", "/a/..", "/../a", "/./a"])
def test_load_rejects_a_root_path_that_clients_normalize(
    mistakes: Callable[..., list[str]], path: str
) -> None:
    """Clients and proxies remove such parts, so the path would never arrive."""
    line = f'server.root_path = "{path}": must not contain "//", and no part of it may be "." or ".."'
    assert mistakes(SD_GATEWAY_SERVER__ROOT_PATH=path) == [line]


@pytest.mark.parametrize("path", ["", "/progress", "/a/b"])
def test_load_accepts_a_root_path(read: Load, path: str) -> None:
    """A prefix begins with a slash and does not end with one; an empty one means no prefix."""
    assert read(SD_GATEWAY_SERVER__ROOT_PATH=path).server.root_path == path


@pytest.mark.parametrize("path", ["/", "progress", "/progress/", "http://host/progress"])
def test_load_rejects_a_root_path(mistakes: Callable[..., list[str]], path: str) -> None:
    """Any other prefix is an error."""
    line = f'server.root_path = "{path}": must be empty, or begin with "/" and not end with it'
    assert mistakes(SD_GATEWAY_SERVER__ROOT_PATH=path) == [line]


# The store


@pytest.mark.parametrize(
    ("url", "hosts", "tls", "database"),
    [
        ("valkey://v", [("v", 6379)], False, 0),
        ("valkeys://v:1/", [("v", 1)], True, 0),
        ("redis://u:p%40@10.0.0.1:7000/2", [("10.0.0.1", 7000)], False, 2),
        ("rediss://[::1]:7", [("::1", 7)], True, 0),
    ],
)
def test_store_url_has_hosts_tls_and_database(
    read: Load,
    url: str,
    hosts: list[tuple[str, int]],
    tls: bool,  # noqa: FBT001
    database: int,
) -> None:
    """The URL determines the server, TLS and the database."""
    store = read(SD_GATEWAY_STORE__URL=url).store
    assert (store.hosts, store.tls, store.database) == (hosts, tls, database)


@pytest.mark.parametrize(("more", "port"), [({"CLUSTER": "true"}, 6379), ({"SENTINEL_SERVICE": "s"}, 26379)])
def test_store_may_have_several_hosts(read: Load, more: dict[str, str], port: int) -> None:
    """The URL lists the nodes of a cluster or the Sentinels, separated by commas."""
    environment = {f"SD_GATEWAY_STORE__{name}": value for name, value in more.items()}
    store = read(SD_GATEWAY_STORE__URL="valkey://u@a,b:1", **environment).store
    assert store.hosts == [("a", port), ("b", 1)]


def test_store_login_comes_from_the_url_or_from_files(read: Load, tmp_path: Path) -> None:
    """A file overrides the URL, and is read when it is needed."""
    url = "valkey://us%40er:p%3Aw@v"
    assert read().store.login() == (None, None)
    assert read(SD_GATEWAY_STORE__URL="valkey://:p@v").store.login() == (None, "p")
    assert read(SD_GATEWAY_STORE__URL=url).store.login() == ("us@er", "p:w")
    file = tmp_path / "password"
    store = read(SD_GATEWAY_STORE__URL=url, SD_GATEWAY_STORE__PASSWORD_FILE=str(file)).store
    file.write_text("other\n")
    assert store.login() == ("us@er", "other")


@pytest.mark.parametrize("name", ["username", "password", "sentinel_username", "sentinel_password"])
def test_store_files_have_the_rule_of_all_secrets(read: Load, tmp_path: Path, name: str) -> None:
    """A byte order mark and white space are removed; an inner line break is refused with the file's name."""
    file = tmp_path / "login"
    store = read(**{f"SD_GATEWAY_STORE__{name.upper()}_FILE": str(file)}).store
    login = store.sentinel_login if name.startswith("sentinel") else store.login
    file.write_bytes(b"\xef\xbb\xbf s3cret\r\n")
    assert "s3cret" in login()
    file.write_bytes(b"s3\ncret")
    with pytest.raises(InvalidSecret) as caught:
        login()
    assert str(caught.value) == f"{file}: contains a line break"


def test_store_url_is_cleaned(read: Load) -> None:
    """A final newline and a byte order mark are no part of the URL."""
    store = read(SD_GATEWAY_STORE__URL="\ufeffvalkey://:p@v:1/2\r\n").store
    assert (store.hosts, store.database, store.login()) == ([("v", 1)], 2, (None, "p"))


@pytest.mark.parametrize("name", ["STORE__URL", "UPSTREAM__PROXY"])
def test_url_that_is_no_valid_secret_is_hidden(mistakes: Callable[..., list[str]], name: str) -> None:
    """A URL with a control character inside is not shown, also without the "@" that ends a password."""
    [line] = mistakes(**{f"SD_GATEWAY_{name}": "valkey://:s3c\nret"})
    setting = name.lower().replace("__", ".")
    assert line == f"{setting} = (hidden): contains a line break"


@pytest.mark.parametrize(
    ("proxy", "shown"),
    [
        ("ftp://p:1", '"ftp://p:1"'),
        ("p:3128", '"p:3128"'),
        ("http://", '"http://"'),
        ("http://p:x", '"http://p:x"'),
        ("http://p:0", '"http://p:0"'),
        ("http://p q:1", '"http://p q:1"'),
        ("socks4://u:hush@p:1", "(hidden)"),
        ("Direct", '"Direct"'),
    ],
)
def test_proxy_that_is_no_url_is_named_with_its_source(tmp_path: Path, proxy: str, shown: str) -> None:
    """A bad proxy is reported like every other setting, with file and line, or with its variable."""
    hint = "; the scheme is missing" if proxy == "p:3128" else ""
    said = f'upstream.proxy = {shown}: must be {PROXY_FORMS}, or "direct"{hint}'
    file = tmp_path / "gateway.toml"
    file.write_text(f"[upstream]\n\nproxy = {json.dumps(proxy)}\n")
    with pytest.raises(SettingsError) as caught:
        load(file, {})
    assert caught.value.mistakes == [f"{file}:3: {said}"]
    with pytest.raises(SettingsError) as caught:
        load(None, {"SD_GATEWAY_UPSTREAM__PROXY": proxy})
    assert caught.value.mistakes == [f"SD_GATEWAY_UPSTREAM__PROXY: {said}"]


def test_store_url_is_never_shown(read: Load) -> None:
    """The URL may contain a password, so printed settings do not show it."""
    assert "s3cret" not in repr(read(SD_GATEWAY_STORE__URL="valkey://u:s3cret@v"))


@pytest.mark.parametrize(
    ("store", "mistake"),
    [
        ({"url": "http://v"}, 'store.url = "http://v": must be valkey://'),
        ({"url": "valkey://"}, 'store.url = "valkey://": must be valkey://'),
        ({"client_cert_file": "a"}, 'store.client_cert_file = "a": needs store.client_key_file'),
        ({"client_key_file": "a"}, 'store.client_key_file = "a": needs store.client_cert_file'),
        ({"url": "valkey://u:s3cret@v:x"}, "store.url = (hidden): must be valkey://"),
        ({"url": "valkey://v?db=1"}, 'store.url = "valkey://v?db=1": must be valkey://'),
        ({"url": "valkey://v/a"}, 'store.url = "valkey://v/a": the path must be'),
        ({"url": "valkey://v/1", "cluster": "true"}, 'store.url = "valkey://v/1": the path must be'),
        ({"url": "valkey://v,w"}, 'store.url = "valkey://v,w": several hosts require'),
        (
            {"url": "valkey://v", "cluster": "true", "sentinel_service": "s"},
            'store.cluster = "true": cannot be combined with',
        ),
        ({"key_prefix": "{x}"}, 'store.key_prefix = "{x}": must be 1 to 64 letters'),
        ({"timeout_seconds": "2"}, 'store.timeout_seconds = "2": must be a number above 0 and at most 1'),
    ],
)
def test_store_reports_errors_in_its_settings(
    mistakes: Callable[..., list[str]], store: dict[str, str], mistake: str
) -> None:
    """Every error is one line without a password."""
    [line] = mistakes(**{f"SD_GATEWAY_STORE__{name.upper()}": value for name, value in store.items()})
    assert line.startswith(mistake)


@pytest.mark.parametrize("host", ["http://127.0.0.1", "127.0.0.1:8080", "[::1]", "[::1]:80", "a b", "a/b"])
def test_host_with_other_parts_of_a_url_is_refused(host: str) -> None:
    """A scheme, port or bracket in server.host stops the start, because no name resolves with it."""
    with pytest.raises(SettingsError) as caught:
        load(None, {"SD_GATEWAY_SERVER__HOST": host})
    said = "must be a host name or an IP address, without scheme, port and brackets"
    assert caught.value.mistakes == [f'SD_GATEWAY_SERVER__HOST: server.host = "{host}": {said}']
