"""No secret leaves the process: all its output is searched during every fault."""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import (
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

# The caller's own credentials, as the vendor's SDKs send them: they must not leak either.
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


class Output:
    """All output of a gateway, and the secrets that must not be in it."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.secrets: set[str] = {
            KEY,
            SECRET,
            *CALLER.values(),
            "callers-token",
            "callers-cookie",
            *FRAGMENTS,
        }

    def query(self, gate: Gateway) -> None:
        """Query a task in every way, and keep the whole responses."""
        task = fresh_id()
        for response in (
            gate.get(task, headers=CALLER),
            gate.client.get(f"/v1/progress/{task}?api=comfy"),
            gate.native(task, headers=CALLER),
            gate.native(task, "comfy_get_result"),
            gate.client.get("/readyz"),
        ):
            self.texts += [f"{name}: {value}" for name, value in response.headers.items()] + [response.text]

    def add_secrets(self, headers: dict[str, str]) -> None:
        """Add the signature and nonce of a request to the secrets."""
        self.secrets |= {headers["x-ca-signature"], headers["x-ca-nonce"]}

    def leaks(self) -> list[str]:
        """Return each secret found in the output, with its surroundings."""
        pattern = "|".join(map(re.escape, self.secrets))
        text = "\n".join(self.texts)
        return [text[max(m.start() - 80, 0) : m.end() + 20] for m in re.finditer(pattern, text)]


@pytest.fixture
def output() -> Output:
    """Return an empty output."""
    return Output()


def test_secrecy_during_every_fault(tmp_path: Path, simulator: Simulator, output: Output) -> None:
    """No log line, response or metric contains key, secret, signature or string to sign during any fault."""
    with serving(tmp_path, {**QUICK, "SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url}) as (process, gate):
        for fault in FAULTS:
            simulator.control("PUT", "/faults", **fault)
            output.query(gate)
            simulator.heal()
        for pairs in (
            {},
            {KEY: "another-secret"},
            {KEY: SECRET},
        ):  # rejected key, rejected signature, accepted
            simulator.pairs.clear()
            simulator.pairs.update(pairs)
            output.query(gate)
        for request in simulator.requests():
            output.add_secrets(request["headers"])
        output.texts.append(gate.client.get("/metrics").text)
        process.signal()
        assert process.exit_status() == 0
    output.texts.append(process.output)
    assert len(output.secrets) > 100
    assert '"level": "debug"' in process.output
    assert output.leaks() == []


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
def test_secrecy_of_an_echoing_upstream(tmp_path: Path, output: Output, name: str) -> None:
    """If the upstream echoes the request in any part of its response, the gateway does not repeat it."""
    echo = dict(_echoes())[name]
    output.secrets -= set(FRAGMENTS)  # a name without its value is not secret

    def behaviour(connection: socket.socket, request: Request) -> None:
        connection.sendall(echo(request))
        connection.close()

    with (
        RawUpstream(behaviour) as upstream,
        serving(tmp_path, {**QUICK, "SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}) as (process, gate),
    ):
        output.query(gate)
        for request in upstream.requests:
            output.add_secrets(request.headers)
        output.texts.append(gate.client.get("/metrics").text)
        process.signal()
        assert process.exit_status() == 0
    output.texts.append(process.output)
    assert output.leaks() == []


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
def test_secrecy_of_an_encoding_upstream(tmp_path: Path, output: Output, place: str) -> None:
    """The signature and the key pair are not repeated, in whatever place and encoding upstream sends them."""
    behave, sent = dict(_places())[place], (str, "")
    patient = {**QUICK, "SD_GATEWAY_UPSTREAM__ATTEMPT_TIMEOUT_SECONDS": "2"}  # no call may time out
    output.secrets.clear()

    def behaviour(connection: socket.socket, request: Request) -> None:
        encode, secret = sent
        text = encode(secret or request.headers["x-ca-signature"])
        output.secrets.add(text)
        connection.sendall(behave(request, text))

    with (
        RawUpstream(behaviour) as upstream,
        serving(tmp_path, {**patient, "SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}) as (process, gate),
    ):
        for coding, encode in CODINGS.items():
            for secret in ("", SECRET, KEY):
                if coding == "cut" and (secret or "answer" in place or "invoke" in place):
                    continue  # a prefix is masked only at the end of a text; a key's prefix is in words
                sent = (encode, secret)
                task = fresh_id()
                for response in (gate.get(task), gate.native(task)):
                    output.texts += [f"{name}: {value}" for name, value in response.headers.items()]
                    output.texts.append(response.text)
                    if "answer" in place or "invoke" in place:
                        assert "contains a secret of the gateway" in response.text
        process.signal()
        assert process.exit_status() == 0
    output.texts.append(process.output)
    assert len(output.secrets) > 20
    assert output.leaks() == []


@pytest.mark.parametrize("size", [10, 90_000])
def test_secrecy_accepts_text_that_looks_like_a_signature(tmp_path: Path, size: int) -> None:
    """A response whose text only looks like a signature is passed on byte for byte."""
    token = base64.b64encode(hashlib.sha256(b"image").digest()).decode()
    sent: list[bytes] = []

    def behaviour(connection: socket.socket, request: Request) -> None:
        sent.append(request.envelope(message=f"{'x' * size} https://h/?t={token} x-ca-key: {token}"))
        connection.sendall(framed(sent[-1]))

    with (
        RawUpstream(behaviour) as upstream,
        # Not QUICK: the response must arrive in time on a busy machine, too.
        serving(tmp_path, {"SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}) as (_, gate),
    ):
        assert gate.native(fresh_id()).content == sent[0]


@pytest.mark.parametrize("before", range(99 - len(SECRET), 99, 3))
def test_secrecy_of_truncated_texts(tmp_path: Path, before: int) -> None:
    """If a log line or response truncates a text, no part of a secret remains before the cut."""

    def behaviour(connection: socket.socket, _: Request) -> None:
        words = "." * (500 - 100 + before) + SECRET
        body = {"status": 20, "apiInvokeId": words, "errMessage": words}
        connection.sendall(framed(json.dumps(body).encode()))

    with (
        RawUpstream(behaviour) as upstream,
        serving(
            tmp_path, {"SD_GATEWAY_LOG__LEVEL": "debug", "SD_GATEWAY_UPSTREAM__ENDPOINT": upstream.url}
        ) as (process, gate),
    ):
        problem = gate.get(fresh_id()).text
        gate.client.get(f"/v1/progress/{'.' * (before % 64)}{SECRET}")
        process.signal()
        assert process.exit_status() == 0
    assert "upstream-rejected" in problem
    assert SECRET[:6] not in problem
    assert SECRET[:6] not in process.output


def test_secrecy_test_can_fail(simulator: Simulator, output: Output) -> None:
    """The rejections of the simulated upstream contain the key, and the search finds it."""
    simulator.pairs[KEY] = "another-secret"
    task, body = fresh_id(), b"{}"
    headers = {"x-ca-key": KEY, "content-type": "application/json", "x-ca-signature-headers": "x-ca-key"}
    refused = simulator.client.post(
        "/scc/sd_get_progress", content=body, headers=headers | {"x-ca-nonce": task}
    )
    output.texts.append(str(refused.headers))
    assert any(KEY in leak for leak in output.leaks())
