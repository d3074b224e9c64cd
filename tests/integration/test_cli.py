"""The commands, as an operator runs them."""

import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from gateway import __version__
from gateway.cli.main import main
from gateway.settings.known_settings import SECTIONS
from gateway.settings.loading import load
from tests.support.harness import (
    COMMAND,
    KEY,
    SECRET,
    Gateway,
    Process,
    RawUpstream,
    Request,
    Simulator,
    framed,
    free_port,
    fresh_id,
    plain_client,
    relay,
    run,
    running,
    serving,
    until,
)
from tests.support.programs import required


def pair(simulator_url: str, **more: str) -> dict[str, str]:
    """Return the environment of a gateway with the right key pair."""
    return {
        "SD_GATEWAY_UPSTREAM__ENDPOINT": simulator_url,
        "SD_GATEWAY_CREDENTIALS__ACCESS_KEY": KEY,
        "SD_GATEWAY_CREDENTIALS__SECRET_KEY": SECRET,
    } | {f"SD_GATEWAY_{name}": value for name, value in more.items()}


# --- usage and settings -----------------------------------------------------------------------------------


def test_cli_prints_its_version(tmp_path: Path) -> None:
    """`--version` prints the version."""
    assert run("--version", cwd=tmp_path) == (0, f"sd-gateway {__version__}")


def test_cli_runs_as_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m gateway` runs the same `main`."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["config", "--config"],
        ["config", "now"],
        ["serve", "--fast"],
        ["simulate", "--port", "high"],
        ["simulate", "--fault", "{}"],
        ["simulate", "--limit", "-1"],
        ["simulate", "--port", "65536"],
        ["simulate", "--port", "-1"],
        ["simulate", "--latency", "-1"],
        ["simulate", "--latency", "nan"],
        ["simulate", "--clock-offset", "inf"],
        ["simulate", "--clock-offset", "soon"],
        ["demo", "--simulator-port", "65536"],
    ],
    ids=" ".join,
)
def test_cli_wrong_usage_exits_with_2(tmp_path: Path, arguments: list[str]) -> None:
    """Invalid usage is explained, with exit status 2."""
    status, output = run(*arguments, cwd=tmp_path)
    assert status == 2
    assert "sd-gateway" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("not json", "a fault is a JSON object"),
        ("[]", "a fault is a JSON object"),
        ('{"name": "fire"}', "unknown fault"),
        ('{"name": "slow", "seconds": "long"}', "seconds: "),
    ],
)
def test_cli_simulate_refuses_invalid_faults(tmp_path: Path, fault: str, says: str) -> None:
    """An invalid --fault stops the start with a message."""
    status, output = run("simulate", "--port", "0", "--fault", fault, cwd=tmp_path)
    assert status == 2
    assert output.startswith("sd-gateway: --fault: ")
    assert says in output


@pytest.mark.parametrize("command", ["serve", "check", "config", "demo"])
def test_cli_reports_all_invalid_settings_at_once(tmp_path: Path, command: str) -> None:
    """Invalid settings stop the start, with one line each: source, key, value and what is allowed."""
    file = tmp_path / "wrong.toml"
    file.write_text(
        '[server]\nport = 70000\n[cache]\nmax_task = 1\n[credentials]\nsecret_key = ["very-secret"]\n'
    )
    env = {"SD_GATEWAY_LOG__LEVEL": "loud", "SD_GATEWAY_UPSTREAM__ENDPOINT": "http://example.com"}
    status, output = run(command, "--config", str(file), cwd=tmp_path, env=env)
    assert status == 2
    lines = sorted(output.splitlines())
    assert len(lines) == 5, output
    for line, names in zip(
        lines,
        [
            (f"{file}:2: server.port", "70000", "65535"),
            (f"{file}:4: cache.max_task", "did you mean cache.max_tasks?"),
            (f"{file}:6: credentials.secret_key", "(hidden)"),
            ("SD_GATEWAY_LOG__LEVEL: log.level", '"loud"', "debug"),
            ("SD_GATEWAY_UPSTREAM__ENDPOINT: upstream.endpoint", "allow_insecure"),
        ],
        strict=True,
    ):
        assert line.startswith(f"sd-gateway: {names[0]}"), line
        assert all(name in line for name in names), line
    assert "very-secret" not in output


def test_cli_missing_settings_file_exits_with_2(tmp_path: Path) -> None:
    """A named settings file that cannot be read, or is not TOML, is an error."""
    status, output = run("serve", "--config", "absent.toml", cwd=tmp_path)
    assert (status, output.count("\n")) == (2, 0)
    assert "absent.toml: cannot be read" in output
    (tmp_path / "broken.toml").write_text("server = [")
    status, output = run("serve", "--config", "broken.toml", cwd=tmp_path)
    assert (status, output.count("\n")) == (2, 0)
    assert "broken.toml:1:1: is not TOML" in output


def test_cli_without_arguments_prints_its_help(tmp_path: Path) -> None:
    """Without a command, the commands are listed on standard output, and the exit status is 0."""
    told = subprocess.run([COMMAND], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.strip() == run("--help", cwd=tmp_path)[1].strip()
    assert {"serve", "check", "config", "watch"} <= set(re.findall(r"^    (\w+)", told.stdout, re.MULTILINE))


def test_cli_ignores_the_variables_of_kubernetes(tmp_path: Path) -> None:
    """In a namespace with a service named sd-gateway, the gateway starts."""
    env = {"SD_GATEWAY_PORT": "tcp://10.0.0.1:80", "SD_GATEWAY_SERVICE_HOST": "10.0.0.1"}
    with serving(tmp_path, env) as (_, gate):
        assert gate.client.get("/healthz").status_code == 200


def test_cli_interrupted_check_exits_with_130(tmp_path: Path) -> None:
    """Ctrl-C while `check` waits for the upstream gives exit status 130, without a traceback."""
    with (
        RawUpstream(lambda *_: None) as upstream,
        Process("check", cwd=tmp_path, env=pair(upstream.url)) as process,
    ):
        until(lambda: upstream.requests, "the query has arrived")
        process.signal(signal.SIGINT)
        assert process.exit_status() == 130
    assert "Traceback" not in process.output


# --- config -----------------------------------------------------------------------------------------------


def test_cli_config_prints_values_and_sources(tmp_path: Path) -> None:
    """`config` prints every setting with its source: default, file and line, or variable."""
    (tmp_path / "config").mkdir()
    file = tmp_path / "config" / "gateway.toml"
    file.write_text("[server]\n\nport = 9000\ntrusted_hosts = ['a', '[::1]']\n")
    env = {"SD_GATEWAY_LOG__LEVEL": "debug", "SPEEDPIX_ENDPOINT": "https://example.com"}
    status, output = run("config", cwd=tmp_path, env=env | {"SD_GATEWAY_PORT": "tcp://10.0.0.1:80"})
    assert status == 0
    first, *lines, last = output.splitlines()
    assert first == "# settings file: config/gateway.toml"
    assert last == "# ignored, because Kubernetes sets them for services: SD_GATEWAY_PORT"
    shown = dict(re.split(" = ", re.sub(r" +(?=# \S+$)", " ", line), maxsplit=1) for line in lines)
    assert list(shown) == [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys]
    assert shown["server.port"] == "9000 # config/gateway.toml:3"
    assert shown["server.trusted_hosts"] == '["a", "[::1]"] # config/gateway.toml:4'
    assert shown["log.level"] == '"debug" # SD_GATEWAY_LOG__LEVEL'
    assert shown["upstream.endpoint"] == '"https://example.com" # SPEEDPIX_ENDPOINT'
    assert shown["server.host"] == '"127.0.0.1" # default'
    assert shown["server.edge"] == "true # default"
    assert shown["store.ca_file"] == '"" # default'


def test_cli_config_prints_settings_that_load_again(tmp_path: Path) -> None:
    """The output is TOML: without secrets, it has the same meaning as the sources."""
    env = {"SD_GATEWAY_SERVER__TRUSTED_HOSTS": "a,b", "SD_GATEWAY_STORE__KEY_PREFIX": "p"}
    status, output = run("config", cwd=tmp_path, env=env)
    assert (status, output.splitlines()[0]) == (
        0,
        "# settings file: none; config/gateway.toml does not exist",
    )
    (tmp_path / "copy.toml").write_text(output)
    assert load(tmp_path / "copy.toml", {}) == load(None, env)


def test_cli_config_shows_no_secret(tmp_path: Path) -> None:
    """Key pairs and the login in a URL are hidden, whichever source they come from."""
    (tmp_path / "gw.toml").write_text(
        "[credentials]\naccess_key = 'hush-1'\nnext_secret_key = 'hush-2://'\n"
        "[store]\nurl = 'valkey://u:hush-3@v'\n"
    )
    env = {"SPEEDPIX_APP_SECRET": "hush-4", "SD_GATEWAY_UPSTREAM__PROXY": "http://u:hush%40-5@proxy:3128"}
    status, output = run("config", "--config", "gw.toml", cwd=tmp_path, env=env)
    assert status == 0
    assert "hush" not in output
    assert re.search(r'^# credentials\.next_secret_key = "\(hidden\)" +# gw\.toml:3$', output, re.MULTILINE)
    assert re.search(r'^# store\.url = "valkey://\(hidden\)@v" +# gw\.toml:5$', output, re.MULTILINE)
    assert '# upstream.proxy = "http://(hidden)@proxy:3128"' in output
    assert {"access_key", "secret_key"}.isdisjoint(tomllib.loads(output)["credentials"])
    (tmp_path / "copy.toml").write_text(output)
    copy, original = load(tmp_path / "copy.toml", {}), load(tmp_path / "gw.toml", env)
    unset = {"credentials": type(original.credentials)()}
    unset |= {
        section: getattr(original, section).model_copy(update={key: getattr(getattr(copy, section), key)})
        for section, key in (("store", "url"), ("upstream", "proxy"))
    }
    assert copy == original.model_copy(update=unset)


# --- serve ------------------------------------------------------------------------------------------------


def test_cli_serve_reads_file_and_environment(tmp_path: Path, simulator: Simulator) -> None:
    """The default settings file is loaded, and overridden by the vendor's variables and the gateway's own."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "gateway.toml").write_text(
        f'[upstream]\nendpoint = "http://127.0.0.1:9"\n[credentials]\nsecret_key = "{SECRET}"\n'
    )
    env = {
        "SPEEDPIX_ENDPOINT": simulator.url,
        "SPEEDPIX_APP_KEY": "overruled",
        "SPEEDPIX_APP_SECRET": "overruled as well",
    }
    with serving(tmp_path, env) as (process, gate):
        assert gate.get(simulator.task()).status_code == 200
        process.signal()
        assert process.exit_status() == 0


def test_cli_serve_on_an_address_in_use_exits_with_1(tmp_path: Path) -> None:
    """An address in use is logged in one line with the address, and the exit status is 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, output = run("serve", cwd=tmp_path, env={"SD_GATEWAY_SERVER__PORT": str(port)})
    assert status == 1
    [line] = output.splitlines()
    told = json.loads(line)
    assert (told["event"], told["reason"]) == ("listen_failed", "Address already in use")
    assert (told["host"], told["port"], told["level"]) == ("127.0.0.1", port, "error")
    assert told["hint"] == "set server.port (SD_GATEWAY_SERVER__PORT) to another port; 0 uses any free port"


def test_cli_serve_on_an_unknown_host_exits_with_1(tmp_path: Path) -> None:
    """A host name that cannot be resolved is logged in the same way."""
    status, output = run("serve", cwd=tmp_path, env={"SD_GATEWAY_SERVER__HOST": "unknown.invalid"})
    assert status == 1
    told = json.loads(output)
    assert (told["event"], told["host"]) == ("listen_failed", "unknown.invalid")
    assert told["reason"]
    assert told["hint"] == "set server.host (SD_GATEWAY_SERVER__HOST) to an address of this machine"


def test_cli_serve_where_metrics_cannot_listen_exits_with_1(tmp_path: Path) -> None:
    """A metrics port in use stops the start in the same way, and is named."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        env = {
            "SD_GATEWAY_SERVER__PORT": "0",
            "SD_GATEWAY_SERVER__METRICS_PORT": str(taken.getsockname()[1]),
        }
        status, output = run("serve", cwd=tmp_path, env=env)
    assert status == 1
    [line] = output.splitlines()
    told = json.loads(line)
    assert (told["event"], told["reason"]) == ("listen_failed", "Address already in use")
    assert str(told["port"]) == env["SD_GATEWAY_SERVER__METRICS_PORT"]
    assert told["hint"] == (
        "set server.metrics_port (SD_GATEWAY_SERVER__METRICS_PORT) to another port; "
        "0 serves /metrics on server.port"
    )


def test_cli_serve_without_credentials_is_not_ready(tmp_path: Path) -> None:
    """Without credentials the gateway runs, but is not ready, and reports why."""
    none = {"SD_GATEWAY_CREDENTIALS__ACCESS_KEY": "", "SD_GATEWAY_CREDENTIALS__SECRET_KEY": ""}
    with serving(tmp_path, none) as (process, gate):
        assert process.says('"event": "(credentials_missing)"')
        response = gate.client.get("/readyz")
        assert response.status_code == 503
        assert response.json()["reasons"] == ["no credentials"]
        assert gate.client.get("/healthz").status_code == 200
        assert gate.get("a").json()["code"] == "upstream-credentials"


# --- check ------------------------------------------------------------------------------------------------


def checked(tmp_path: Path, env: dict[str, str]) -> tuple[int, str]:
    """Run `check`; its output must contain no key."""
    status, output = run("check", cwd=tmp_path, env=env)
    for secret in (KEY, SECRET, "wrong-key", "wrong-secret", "next-key", "next-secret"):
        assert secret not in output
    assert "Traceback" not in output
    return status, output


def test_cli_check_succeeds(tmp_path: Path, simulator: Simulator) -> None:
    """With the right key pair `check` reports success and exits with 0."""
    status, output = checked(tmp_path, pair(simulator.url))
    assert status == 0
    assert "OK: key, signature and clock accepted" in output
    assert simulator.calls() == 1
    assert re.search(r"^latency: the response took \d+ ms, with the connection$", output, re.MULTILINE)
    assert output.splitlines()[-1] == "clock: the local clock agrees with the upstream's to the second"


@pytest.mark.parametrize(("ahead", "word"), [(100, "behind"), (-100, "ahead of")])
def test_cli_check_measures_the_clock(tmp_path: Path, simulator: Simulator, ahead: int, word: str) -> None:
    """A clock that is wrong by less than the upstream allows is no failure, and is reported."""
    simulator.ahead_seconds = ahead
    status, output = checked(tmp_path, pair(simulator.url))
    assert status == 0
    told = re.search(
        rf"^clock: the local clock is (\d+) s {word} the upstream's; 15 minutes", output, re.MULTILINE
    )
    assert told, output
    assert abs(int(told[1]) - 100) < 30


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (SECRET, ""),
        (f"{SECRET}\n", "; a final newline was removed"),
        (f" {SECRET}\r\n", "; white space at its beginning was removed; a final newline was removed"),
        (f"\ufeff{SECRET}", "; a byte order mark was removed"),
    ],
    ids=["plain", "newline", "space", "mark"],
)
@pytest.mark.parametrize("source", ["variable", "sdk", "file", "settings"])
def test_cli_check_accepts_a_secret_as_people_write_it(
    tmp_path: Path, simulator: Simulator, written: str, says: str, source: str
) -> None:
    """From every source, blanks are removed; `check` counts the characters and says what it removed."""
    env = pair(simulator.url)
    if source == "variable":
        env["SD_GATEWAY_CREDENTIALS__SECRET_KEY"] = written
    else:
        del env["SD_GATEWAY_CREDENTIALS__SECRET_KEY"]
    if source == "sdk":
        env["SPEEDPIX_APP_SECRET"] = written
    elif source == "file":
        (tmp_path / "secret").write_bytes(written.encode())
        env["SD_GATEWAY_CREDENTIALS__SECRET_KEY_FILE"] = "secret"
    elif source == "settings":
        (tmp_path / "config").mkdir()
        settings = f"[credentials]\nsecret_key = {json.dumps(written)}\n"
        (tmp_path / "config" / "gateway.toml").write_text(settings)
    status, output = checked(tmp_path, env)
    assert status == 0
    lines = output.splitlines()
    assert f"access key: {len(KEY)} characters" in lines
    assert f"secret key: {len(SECRET)} characters{says}" in lines


def test_cli_check_names_the_source_of_each_key(tmp_path: Path, simulator: Simulator) -> None:
    """A variable that replaces one key of the settings file is named; no log lines are mixed in."""
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "config").mkdir()
    settings = '[credentials]\naccess_key_file = "access"\nsecret_key_file = "secret"\n'
    (tmp_path / "config" / "gateway.toml").write_text(settings)
    env = {"SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url, "SPEEDPIX_APP_KEY": KEY}
    status, output = checked(tmp_path, env)
    assert status == 0
    assert "keys set by SPEEDPIX_APP_KEY and config/gateway.toml:3" in output.splitlines()
    assert '"event"' not in output
    status, output = checked(tmp_path, {"SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url})
    assert status == 1
    assert "credentials.access_key_file: no such file" in output
    assert '"event"' not in output


def test_cli_check_reports_quotes(tmp_path: Path, simulator: Simulator) -> None:
    """Quotes are part of the secret, so the upstream refuses it; the line about it gives the reason."""
    env = pair(simulator.url, CREDENTIALS__SECRET_KEY=f'"{SECRET}"')
    status, output = checked(tmp_path, env)
    assert status == 1
    assert f"secret key: {len(SECRET) + 2} characters; the quotes around it are part of it" in output


def test_cli_refuses_a_secret_that_cannot_be_meant(tmp_path: Path, simulator: Simulator) -> None:
    """A control character within a secret stops the start; the message names the setting."""
    env = pair(simulator.url, CREDENTIALS__SECRET_KEY=f"{SECRET}\nSPEEDPIX_APP_KEY={KEY}")
    status, output = checked(tmp_path, env)
    assert status == 2
    assert "credentials.secret_key = (hidden): contains a line break" in output


def test_cli_check_succeeds_if_the_test_task_exists(tmp_path: Path, simulator: Simulator) -> None:
    """Any envelope proves that the signature was accepted."""
    simulator.task("0" * 26)
    assert checked(tmp_path, pair(simulator.url))[0] == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"CREDENTIALS__ACCESS_KEY": "wrong-key"}, "access key: unknown to the upstream"),
        (
            {"CREDENTIALS__SECRET_KEY": "wrong-secret"},
            "secret key: wrong; all else in the signature is right",
        ),
        (
            {"CREDENTIALS__SECRET_KEY": ""},
            "secret key: set SPEEDPIX_APP_SECRET or SD_GATEWAY_CREDENTIALS__SECRET_KEY, or name a file",
        ),
        (
            {"CREDENTIALS__SECRET_KEY": "", "CREDENTIALS__ACCESS_KEY": ""},
            "no key pair: the gateway needs an access key and a secret key\naccess key: set SPEEDPIX_APP_KEY",
        ),
    ],
    ids=["wrong-key", "wrong-secret", "half", "none"],
)
def test_cli_check_explains_a_wrong_pair(
    tmp_path: Path, simulator: Simulator, changes: dict[str, str], says: str
) -> None:
    """`check` reports whether the access key or the secret key is wrong."""
    status, output = checked(tmp_path, pair(simulator.url, **changes))
    assert status == 1
    assert says in output


@pytest.mark.parametrize(
    ("known", "says"),
    [
        ({KEY, "next-key"}, "both key pairs work"),
        ({KEY}, "only the active key pair works"),
        ({"next-key"}, "only the next key pair works"),
        ({}, "neither key pair works"),
    ],
    ids=["both", "active", "next", "neither"],
)
def test_cli_check_tries_both_pairs(tmp_path: Path, simulator: Simulator, known: set[str], says: str) -> None:
    """`check` tries the active and the next key pair; one that does not work makes it fail."""
    both = {KEY: SECRET, "next-key": "next-secret"}
    simulator.reset(pairs={key: secret for key, secret in both.items() if key in known})
    following = {"CREDENTIALS__NEXT_ACCESS_KEY": "next-key", "CREDENTIALS__NEXT_SECRET_KEY": "next-secret"}
    status, output = checked(tmp_path, pair(simulator.url, **following))
    assert status == (0 if len(known) == 2 else 1)
    assert output.splitlines()[-1].startswith(says)
    assert [line for line in output.splitlines() if line.endswith("key pair:")] == [
        "active key pair:",
        "next key pair:",
    ]
    assert output.count("OK: key, signature and clock accepted") == len(known)
    assert simulator.calls() == 2


def test_cli_check_reports_an_incomplete_pair(tmp_path: Path, simulator: Simulator) -> None:
    """An incomplete next key pair makes `check` fail, although the active one works."""
    status, output = checked(tmp_path, pair(simulator.url, CREDENTIALS__NEXT_ACCESS_KEY="next-key"))
    assert status == 1
    assert "next key pair: cannot be read: credentials.next_secret_key: is empty; set it" in output
    assert "OK: key, signature and clock accepted" in output
    assert output.splitlines()[-1].startswith("only the active key pair works")


@pytest.mark.parametrize(("ahead", "word"), [(3600, "behind"), (-3600, "ahead")])
def test_cli_check_explains_a_wrong_clock(
    tmp_path: Path, simulator: Simulator, ahead: int, word: str
) -> None:
    """A refused timestamp is reported with the offset of the local clock in seconds."""
    simulator.ahead_seconds = ahead
    status, output = checked(tmp_path, pair(simulator.url))
    assert status == 1
    told = re.search(rf"clock: the local clock is (\d+) seconds {word}", output)
    assert told, output
    assert abs(int(told[1]) - 3600) < 60


REFUSED = {
    "quota": ({"code": "B403MQ", "message": "Quota Exhausted"}, "account: the access key is known"),
    "throttled": ({"code": "T429PA", "message": "Throttled by APP Flow Control"}, "upstream: "),
    "request": ({"status": 400, "message": "Invalid Url"}, "upstream: "),
    "bare-signature": ({"status": 403, "message": "Invalid Signature"}, "secret key: wrong, or a proxy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_cli_check_explains_a_refusal(tmp_path: Path, simulator: Simulator, name: str) -> None:
    """`check` explains each refusal of the API gateway, and quotes it."""
    fault, says = REFUSED[name]
    simulator.fault("refuse", **fault)
    status, output = checked(tmp_path, pair(simulator.url))
    assert status == 1
    assert says in output
    assert f"response of the upstream: {fault.get('status') or fault['code'][1:4]}" in output


def test_cli_check_explains_an_invalid_response(tmp_path: Path, simulator: Simulator) -> None:
    """A response that is no envelope is reported as such."""
    simulator.fault("body")
    status, output = checked(tmp_path, pair(simulator.url))
    assert status == 1
    assert "upstream: the upstream's answer is not JSON" in output


def test_cli_check_explains_network_errors(tmp_path: Path, simulator: Simulator) -> None:
    """An upstream that does not respond, or does not listen, is reported as a network error."""
    simulator.fault("silent")
    status, output = checked(tmp_path, pair(simulator.url, UPSTREAM__ATTEMPT_TIMEOUT_SECONDS="0.2"))
    assert status == 1
    assert "network: the upstream did not answer in time" in output
    status, output = checked(tmp_path, pair(f"http://127.0.0.1:{free_port()}"))
    assert status == 1
    assert "network: the upstream could not be reached: connection refused, or blocked" in output


def test_cli_check_explains_each_connection_error(tmp_path: Path, simulator: Simulator) -> None:
    """Each cause of a failed connection has its own message."""

    def told(endpoint: str) -> str:
        status, output = checked(tmp_path, pair(endpoint))
        assert status == 1
        return output

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    assert "host name not found" in told("https://unknown.invalid")
    assert "TLS handshake failed" in told(simulator.url.replace("http:", "https:"))
    with running(simulator.stage, lifespan="off", ssl_context_factory=lambda *_: context) as url:
        assert "the certificate could not be verified (unable to get local issuer certificate)" in told(url)


def checked_past_a_meddler(tmp_path: Path, simulator: Simulator, header: bytes, value: bytes) -> str:
    """Run `check` through a proxy that changes the value of a header; return its output."""

    def meddle(connection: socket.socket, request: Request) -> None:
        head = re.sub(rb"(?i)\n%s: [^\r]*" % header, rb"\n%s: %s" % (header, value), request.head)
        connection.sendall(relay(simulator.url, request, head))
        connection.close()

    with RawUpstream(meddle) as proxy:
        status, output = checked(tmp_path, pair(proxy.url))
    assert status == 1
    return output


def test_cli_check_shows_what_a_proxy_changed(tmp_path: Path, simulator: Simulator) -> None:
    """If a proxy changes the request, `check` shows the lines that differ, without a key."""
    output = checked_past_a_meddler(tmp_path, simulator, b"accept", b"*/*")
    assert "signature: a proxy changed the request" in output
    assert "- application/json" in output
    assert "+ */*" in output


def test_cli_check_shows_a_changed_key_masked(tmp_path: Path, simulator: Simulator) -> None:
    """If the key itself was changed, its values are masked in the lines that differ."""
    output = checked_past_a_meddler(tmp_path, simulator, b"x-ca-nonce", b"another")
    assert "+ x-ca-nonce:[redacted]" in output
    assert "another" not in output


@pytest.mark.parametrize("date", ["Fri, 31 Dec 99999 23:59:59 GMT", "Fri, 31 Dec 9999 23:59:60 GMT", "soon"])
def test_cli_check_explains_an_invalid_date(tmp_path: Path, date: str) -> None:
    """An invalid Date counts as missing."""
    message = "x-ca-error-message: Timestamp Expired \x9b31m"

    def behaviour(connection: socket.socket, _: Request) -> None:
        connection.sendall(framed(b"", message, f"date: {date}", status="HTTP/1.1 400 Bad Request"))
        connection.close()

    with RawUpstream(behaviour) as upstream:
        status, output = checked(tmp_path, pair(upstream.url))
    assert status == 1
    assert "the response has no valid Date" in output
    assert "Traceback" not in output
    assert "\x9b" not in output


def test_cli_check_explains_a_missing_date(tmp_path: Path) -> None:
    """A refused timestamp without a Date is reported without an offset."""

    def behaviour(connection: socket.socket, _: Request) -> None:
        message = "x-ca-error-message: Timestamp Expired"
        connection.sendall(framed(b"", message, status="HTTP/1.1 400 Bad Request"))

    with RawUpstream(behaviour) as upstream:
        status, output = checked(tmp_path, pair(upstream.url))
    assert status == 1
    assert "has no valid Date" in output


# --- simulate and demo ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_cli_simulate_uses_its_options(
    tmp_path: Path, launch: Callable[..., Gateway], number: signal.Signals, status: int
) -> None:
    """`simulate` accepts its key pair, applies its faults, uses its own clock, and stops on a signal."""
    arguments = ["--port", "0", "--key", KEY, "--secret", SECRET, "--clock-offset", "7200", "--limit", "7"]
    fault = json.dumps({"name": "reject", "errCode": "E1", "operation": "comfy_get_progress"})
    with (
        Process("simulate", *arguments, "--fault", fault, cwd=tmp_path) as process,
        plain_client(process.says("simulated upstream on (.*)")) as control,
    ):
        task = control.post("/_simulator/tasks", json={}).json()["taskId"]
        gate = launch(str(control.base_url).rstrip("/"))
        assert gate.get(task).status_code == 200
        assert abs(gate.metric("upstream_clock_skew_seconds") - 7200) < 60
        assert gate.get(f"{task}?api=comfy").json()["upstream"]["errCode"] == "E1"
        asked = (gate.get(fresh_id()).json()["code"] for _ in range(1000))
        assert "upstream-throttled" in asked
        process.signal(number)
        assert process.exit_status() == status
    assert "Traceback" not in process.output


@pytest.mark.parametrize(
    "content",
    [
        SECRET.encode(),
        f"{SECRET}\r\n".encode(),
        f"\ufeff {SECRET}\nignored".encode(),
        f"\ufeff{SECRET}\r\n".encode("utf-16-le"),
    ],
    ids=["plain", "windows", "mark", "utf-16"],
)
def test_cli_simulate_reads_a_secret_as_people_write_it(
    tmp_path: Path, launch: Callable[..., Gateway], content: bytes
) -> None:
    """The secret on standard input is read by the rule of all secrets."""
    with secret_on_stdin(tmp_path, content) as process:
        gate = launch(process.says("simulated upstream on (.*)"))
        assert (
            gate.get("abc").json()["code"] == "upstream-rejected"
        )  # an unknown task: the signature is right


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a\x07secret", "contains a control character (U+0007)"),
        ("a-secret\u200b".encode(), "ends with an invisible character (U+200B)"),
        (b"\xff", "is not UTF-8"),
        (b"x" * 70_000, "is larger than 65536 bytes"),
    ],
    ids=["control", "invisible", "encoding", "large"],
)
def test_cli_simulate_refuses_a_secret_that_cannot_be_meant(
    tmp_path: Path, content: bytes, says: str
) -> None:
    """Such a secret on standard input is wrong usage; the message does not show it."""
    with secret_on_stdin(tmp_path, content) as process:
        assert process.exit_status() == 2
    assert process.output == f"sd-gateway: --secret-stdin: {says}"


def secret_on_stdin(tmp_path: Path, content: bytes) -> Process:
    """Start a simulator that reads its secret from standard input."""
    (tmp_path / "secret").write_bytes(content)
    command = f"exec '{COMMAND}' simulate --port 0 --key {KEY} --secret-stdin < secret"
    return Process("-c", command, cwd=tmp_path, program=Path("/bin/sh"))


def test_cli_simulate_prints_how_to_use_it(tmp_path: Path) -> None:
    """The printed commands use the simulator with its key pair; a secret of the user is not printed."""
    required("curl")
    with Process("simulate", "--port", "0", cwd=tmp_path) as process:
        command = process.says(r"To try it: (.*) (?:\S*/)?sd-gateway check")
        env = dict(word.split("=", 1) for word in command.split())
        status, output = run("check", cwd=tmp_path, env=env)
        create = process.says(r"To create one: (curl .*)")
        created = subprocess.run(["sh", "-c", create], capture_output=True, check=True)
    assert status == 0, output
    assert json.loads(created.stdout) == {"taskId": "task-1"}
    with Process("simulate", "--port", "0", "--secret", "hush", cwd=tmp_path) as process:
        process.says("It has no tasks")
        process.signal()
        assert process.exit_status() == 0
    assert not any("hush" in line for line in process.lines)


def test_cli_simulate_on_an_address_in_use_exits_with_1(tmp_path: Path) -> None:
    """An address in use is reported with the reason, and nothing else."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = run("simulate", "--port", str(port), cwd=tmp_path)
    reason = "Address already in use; --port 0 uses any free port"
    assert told == (1, f"sd-gateway: cannot listen on http://127.0.0.1:{port}: {reason}")


@pytest.mark.parametrize("taken", [("gateway",), ("simulator",), ("gateway", "simulator")], ids="-".join)
def test_cli_demo_names_all_ports_in_use(tmp_path: Path, taken: tuple[str, ...]) -> None:
    """One message names each port in use, and how to choose another. No URL is printed: it is not ours."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = {"gateway": one.getsockname()[1], "simulator": two.getsockname()[1]}
        used = {name: port if name in taken else free_port() for name, port in ports.items()}
        env = {"SD_GATEWAY_SERVER__PORT": str(used["gateway"])}
        status, output = run("demo", "--simulator-port", str(used["simulator"]), cwd=tmp_path, env=env)
    assert status == 1
    urls = " and ".join(f"http://127.0.0.1:{port}" for name, port in used.items() if name in taken)
    reason = "already in use, perhaps by another demo; to use a free port"
    # The hint keeps the port that is free.
    variable = f"SD_GATEWAY_SERVER__PORT={0 if 'gateway' in taken else used['gateway']}"
    option = f"--simulator-port {0 if 'simulator' in taken else used['simulator']}"
    demo, make = f"{variable} sd-gateway demo {option}", f'{variable} make demo ARGS="{option}"'
    assert output == f"sd-gateway: cannot listen on {urls}: {reason}: {demo}, or {make}"


def test_cli_demo_prints_its_urls(tmp_path: Path) -> None:
    """The printed URLs have the actual port and the prefix."""
    env = {
        "SD_GATEWAY_SERVER__HOST": "::1",
        "SD_GATEWAY_SERVER__PORT": "0",
        "SD_GATEWAY_SERVER__ROOT_PATH": "/prefix",
    }
    with Process("demo", "--simulator-port", "0", cwd=tmp_path, env=env) as process:
        url = process.says(r"curl (http://\[::1\]:\d+/prefix/v1/progress/demo-1)")
        with plain_client("") as client:
            assert client.get(url.replace("demo-1", "demo-6")).json()["status"] == "succeeded"


def test_cli_demo_runs_and_stops_both_processes(tmp_path: Path) -> None:
    """`demo` starts both processes, prints working URLs, and stops both on a signal."""
    port, simulator_port = free_port(), free_port()
    env = {"SD_GATEWAY_SERVER__PORT": str(port)}
    with Process("demo", "--simulator-port", str(simulator_port), cwd=tmp_path, env=env) as process:
        url = process.says(r"curl (http://\S+/v1/progress/demo-1)\b")
        assert process.says(r"Open in a browser: +(\S+)").startswith(
            f"http://127.0.0.1:{port}/?taskId=demo-1&"
        )
        program = process.says(r"Watch here: +(\S+) watch demo-1 demo-2 --gateway")
        assert shutil.which(program), "a shell finds the program"
        pasted = process.says(r"Paste there: +(\[.*\])")
        assert [task["taskId"] for task in json.loads(pasted)] == ["demo-2", "demo-6", "demo-7"]
        process.says("Stop: +Ctrl-C")
        with plain_client("") as client:
            seen = {client.get(url).json()["progress"]}
            until(lambda: seen.add(client.get(url).json()["progress"]) or len(seen) > 1, "the task moves")
        process.signal()
        assert process.exit_status() == 0
    assert "Traceback" not in process.output
    for gone in (port, simulator_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", gone))


def test_cli_demo_does_not_use_another_simulator(tmp_path: Path, simulator: Simulator) -> None:
    """If the simulator's port is in use, the demo reports it and exits with 1."""
    port = str(simulator.client.base_url.port)
    env = {"SD_GATEWAY_SERVER__PORT": str(free_port())}
    status, output = run("demo", "--simulator-port", port, cwd=tmp_path, env=env)
    assert status == 1
    assert f"sd-gateway: cannot listen on http://127.0.0.1:{port}: already in use" in output
    assert "Traceback" not in output
    assert simulator.stats()["calls"] == {}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_cli_demo_stopped_during_its_start_stops_its_simulator(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    """A demo that is stopped during its start stops its simulator, too."""
    port, simulator_port = free_port(), free_port()
    env = {"SD_GATEWAY_SERVER__PORT": str(port)}
    with Process("demo", "--simulator-port", str(simulator_port), cwd=tmp_path, env=env) as process:
        child = until(process.children, "the simulator is a process")[0]
        process.signal(number)
        assert process.exit_status() == status
    assert "Traceback" not in process.output
    until(lambda: not Path(f"/proc/{child}").exists(), "the simulator is gone")
