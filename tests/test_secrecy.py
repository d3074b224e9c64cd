"""No secret leaves the process: everything it says is searched while every fault runs."""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import (
    KEY,
    SECRET,
    Gateway,
    RawUpstream,
    Request,
    Simulator,
    answer,
    framed,
    fresh_id,
    serving,
)

# The caller's own credentials, in the vendor SDKs' places: they are nobody's business either.
CALLER = {
    "x-ca-key": "callers-access-key",
    "x-ca-signature": base64.b64encode(hashlib.sha256(b"callers").digest()).decode(),
    "authorization": "Bearer callers-token",
    "cookie": "session=callers-cookie",
}
FRAGMENTS = (
    "x-ca-timestamp:",
    "x-ca-nonce:",
    "x-ca-signature-method:HmacSHA256",
    "#x-ca-",
    "POST#application/json",
)
QUICK = {
    "SD_GATEWAY_LOG__LEVEL": "debug",
    "SD_GATEWAY_CACHE__ERROR_SECONDS": "0",
    "SD_GATEWAY_UPSTREAM__ATTEMPT_TIMEOUT_SECONDS": "0.1",
    "SD_GATEWAY_UPSTREAM__RETRIES": "0",
}

TELLTALE = f"for {KEY} with {SECRET}: "
FAULTS: list[dict[str, Any]] = [
    {"name": "refuse", "code": "A400IK", "message": f"Invalid AppKey {KEY}"},
    {
        "name": "refuse",
        "code": "A403IS",
        "message": f"Invalid Signature, Server StringToSign:`POST#x-ca-key:{KEY}#`",
    },
    {
        "name": "refuse",
        "message": f"Invalid Signature, Server StringToSign:`POST#x-ca-key:{KEY}#`",
        "legacy": True,
    },
    {"name": "refuse", "code": "T429PA", "message": f"Throttled by APP Flow Control {KEY}", "retryAfter": 1},
    {"name": "refuse", "code": "B403MQ", "message": f"Quota Exhausted {KEY}"},
    {"name": "refuse", "code": "X503BZ", "message": f"Service Unavailable {KEY}"},
    {"name": "refuse", "status": 400, "message": f"Timestamp Expired {KEY}"},
    {"name": "refuse", "status": 418, "message": TELLTALE},
    {"name": "status", "status": 500},
    {"name": "status", "status": 504},
    {
        "name": "reject",
        "errCode": KEY,
        "errMessage": TELLTALE,
        "subErrCode": SECRET,
        "subErrMessage": TELLTALE,
    },
    {"name": "body", "body": f"<html>{TELLTALE}</html>"},
    {"name": "body", "body": f'{{"status": 10, "data": {{"taskId": "{KEY}"}}}}'},
    {"name": "body", "body": f'{{"status": "{KEY}"}}'},
    {"name": "silent"},
    {"name": "drip", "interval": 0.05},
    {"name": "cut"},
    {"name": "large", "bytes": 2_000_000},
    {"name": "gzip_bomb", "bytes": 2_000_000},
    {"name": "redirect", "location": f"https://example.invalid/?{KEY}"},
    {"name": "cookie"},
    {"name": "deep"},
]


class Heard:
    """Everything that a gateway was heard to say, and what must not be in it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.secrets: set[str] = {
            KEY,
            SECRET,
            *CALLER.values(),
            "callers-token",
            "callers-cookie",
            *FRAGMENTS,
        }

    def ask(self, gate: Gateway) -> None:
        """Ask in every way for a task, and keep the answers whole."""
        task = fresh_id()
        for response in (
            gate.get(task, headers=CALLER),
            gate.client.get(f"/v1/progress/{task}?api=comfy"),
            gate.native(task, headers=CALLER),
            gate.native(task, "comfy_get_result"),
            gate.client.get("/readyz"),
        ):
            self.said += [f"{name}: {value}" for name, value in response.headers.items()] + [response.text]

    def learn(self, headers: dict[str, str]) -> None:
        """Add what a request upstream was signed with to what must not be heard."""
        self.secrets |= {headers["x-ca-signature"], headers["x-ca-nonce"]}

    def leaks(self) -> list[str]:
        """Return what was heard of the secrets, with its surroundings."""
        pattern = "|".join(map(re.escape, self.secrets))
        said = "\n".join(self.said)
        return [said[max(m.start() - 80, 0) : m.end() + 20] for m in re.finditer(pattern, said)]


@pytest.fixture
def heard() -> Heard:
    """Return an ear that has heard nothing yet."""
    return Heard()


def test_secrecy_under_every_fault(tmp_path: Path, simulator: Simulator, heard: Heard) -> None:
    """Key, secret, signature and string to sign are in no log line, answer or metric, whatever goes wrong."""
    with serving(tmp_path, {**QUICK, "SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url}) as (process, gate):
        for fault in FAULTS:
            simulator.control("PUT", "/faults", **fault)
            heard.ask(gate)
            simulator.heal()
        for pairs in ({}, {KEY: "another-secret"}, {KEY: SECRET}):  # refused key, refused signature, well
            simulator.pairs.clear()
            simulator.pairs.update(pairs)
            heard.ask(gate)
        for request in simulator.requests():
            heard.learn(request["headers"])
        heard.said.append(gate.client.get("/metrics").text)
        process.signal()
        assert process.exit_status() == 0
    heard.said.append(process.output)
    assert len(heard.secrets) > 100
    assert '"level": "debug"' in process.output
    assert heard.leaks() == []


def _echoes() -> Iterator[tuple[str, Any]]:
    def as_head(request: Request) -> bytes:
        return b"HTTP/1.1 200 OK\r\n" + request.head + b"\r\n\r\n" + request.body

    def as_garbage(request: Request) -> bytes:
        return request.head + b"\r\n\r\n"

    def as_header(request: Request) -> bytes:
        lines = request.head.decode().split("\r\n")[1:]
        return answer(b"{}", "content-length: 2", *lines)

    def as_page(request: Request) -> bytes:
        return framed(request.head, status="HTTP/1.1 400 Bad Request")

    def as_message(request: Request) -> bytes:
        text = request.head.replace(b"\r\n", b"#").decode()
        return framed(b"", f"x-ca-error-message: Odd {text}", status="HTTP/1.1 400 Bad Request")

    def as_encoding(request: Request) -> bytes:
        return framed(b"", f"content-encoding: {request.headers['x-ca-signature']}")

    for echo in (as_head, as_garbage, as_header, as_page, as_message, as_encoding):
        yield echo.__name__, echo


@pytest.mark.parametrize("name", dict(_echoes()))
def test_secrecy_of_what_upstream_sends_back(tmp_path: Path, heard: Heard, name: str) -> None:
    """An upstream that sends our own request back, in whatever place, does not make us repeat it."""
    echo = dict(_echoes())[name]
    heard.secrets -= set(FRAGMENTS)  # a name without its value tells nothing

    def behaviour(connection: socket.socket, request: Request) -> None:
        connection.sendall(echo(request))
        connection.close()

    with (
        RawUpstream(behaviour) as upstream,
        serving(tmp_path, {**QUICK, "SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}) as (process, gate),
    ):
        heard.ask(gate)
        for request in upstream.requests:
            heard.learn(request.headers)
        heard.said.append(gate.client.get("/metrics").text)
        process.signal()
        assert process.exit_status() == 0
    heard.said.append(process.output)
    assert heard.leaks() == []


CODINGS = {
    "as it is": str,
    "lower case": str.lower,
    "hex": lambda text: text.encode().hex(),
    "percent": lambda text: "".join(f"%{ord(char):02x}" for char in text),
    "base64": lambda text: base64.b64encode(b"u" + text.encode()).decode().rstrip("="),
    "spaces": " ".join,
    "unpadded": lambda text: text.rstrip("="),
    "cut": lambda text: text[:12],
}


def _places() -> Iterator[tuple[str, Any]]:
    def in_header(_: Request, text: str) -> bytes:
        return framed(b"", f"x-ca-error-message: Odd {text}", status="HTTP/1.1 400 Bad Request")

    def in_code(_: Request, text: str) -> bytes:
        return framed(b"", f"x-ca-error-code: {text}", status="HTTP/1.1 400 Bad Request")

    def in_message(_: Request, text: str) -> bytes:
        return framed(json.dumps({"status": 20, "errMessage": f"of {text}"}).encode())

    def in_rejection(_: Request, text: str) -> bytes:
        return framed(json.dumps({"status": 20, "other": [{"of": f"of {text}"}]}).encode())

    def in_large_rejection(_: Request, text: str) -> bytes:
        return framed(json.dumps({"status": 20, "errCode": text, "other": ["x" * 90_000, text]}).encode())

    def in_answer(request: Request, text: str) -> bytes:
        return framed(request.envelope(message=f"of {text}"))

    def in_large_answer(request: Request, text: str) -> bytes:
        return framed(request.envelope(message="x" * 90_000 + text))

    def in_invoke_id(request: Request, text: str) -> bytes:
        return framed(json.dumps(json.loads(request.envelope()) | {"apiInvokeId": text}).encode())

    for place in (
        in_header,
        in_code,
        in_message,
        in_rejection,
        in_large_rejection,
        in_answer,
        in_large_answer,
        in_invoke_id,
    ):
        yield place.__name__, place


@pytest.mark.parametrize("place", dict(_places()))
def test_secrecy_of_what_upstream_encodes(tmp_path: Path, heard: Heard, place: str) -> None:
    """The call's signature and our keys are not repeated, wherever and however upstream sends them back."""
    behave, told = dict(_places())[place], (str, "")
    heard.secrets.clear()

    def behaviour(connection: socket.socket, request: Request) -> None:
        encode, secret = told
        text = encode(secret or request.headers["x-ca-signature"])
        heard.secrets.add(text)
        connection.sendall(behave(request, text))

    with (
        RawUpstream(behaviour) as upstream,
        serving(tmp_path, {**QUICK, "SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}) as (process, gate),
    ):
        for coding, encode in CODINGS.items():
            for secret in ("", SECRET, KEY):
                if coding == "cut" and (secret or "answer" in place or "invoke" in place):
                    continue  # a beginning is hidden at the end of a text alone; of a key it is in words
                told = (encode, secret)
                task = fresh_id()
                for response in (gate.get(task), gate.native(task)):
                    heard.said += [f"{name}: {value}" for name, value in response.headers.items()]
                    heard.said.append(response.text)
                    if "answer" in place or "invoke" in place:
                        assert "contains a secret of the gateway" in response.text
        process.signal()
        assert process.exit_status() == 0
    heard.said.append(process.output)
    assert len(heard.secrets) > 20
    assert heard.leaks() == []


@pytest.mark.parametrize("size", [10, 90_000])
def test_secrecy_takes_no_shape_for_a_secret_of_ours(tmp_path: Path, size: int) -> None:
    """An answer whose text only looks like a signature is passed on byte for byte."""
    token = base64.b64encode(hashlib.sha256(b"image").digest()).decode()
    sent: list[bytes] = []

    def behaviour(connection: socket.socket, request: Request) -> None:
        sent.append(request.envelope(message=f"{'x' * size} https://h/?t={token} x-ca-key: {token}"))
        connection.sendall(framed(sent[-1]))

    with (
        RawUpstream(behaviour) as upstream,
        serving(tmp_path, {**QUICK, "SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}) as (_, gate),
    ):
        assert gate.native(fresh_id()).content == sent[0]


@pytest.mark.parametrize("before", range(99 - len(SECRET), 99, 3))
def test_secrecy_of_texts_that_are_cut(tmp_path: Path, before: int) -> None:
    """Wherever a log line or an answer cuts a text short, no part of a secret is left before the cut."""

    def behaviour(connection: socket.socket, _: Request) -> None:
        words = "." * (500 - 100 + before) + SECRET
        body = {"status": 20, "apiInvokeId": words, "errMessage": words}
        connection.sendall(framed(json.dumps(body).encode()))

    with (
        RawUpstream(behaviour) as upstream,
        serving(tmp_path, {**QUICK, "SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}) as (process, gate),
    ):
        said = gate.get(fresh_id()).text
        gate.client.get(f"/v1/progress/{'.' * (before % 64)}{SECRET}")
        process.signal()
        assert process.exit_status() == 0
    assert "upstream-rejected" in said
    assert SECRET[:6] not in said
    assert SECRET[:6] not in process.output


def test_secrecy_test_can_fail(simulator: Simulator, heard: Heard) -> None:
    """What the simulated upstream says in its refusals would be found: it does hold our key."""
    simulator.pairs[KEY] = "another-secret"
    task, body = fresh_id(), b"{}"
    headers = {"x-ca-key": KEY, "content-type": "application/json", "x-ca-signature-headers": "x-ca-key"}
    refused = simulator.client.post(
        "/scc/sd_get_progress", content=body, headers=headers | {"x-ca-nonce": task}
    )
    heard.said.append(str(refused.headers))
    assert any(KEY in leak for leak in heard.leaks())
