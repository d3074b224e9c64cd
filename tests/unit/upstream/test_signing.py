"""The request signature: requests of vendor SDKs, and changes to any part."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gateway.upstream.signing import content_md5, sign, signed_headers, string_to_sign, verify

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "data" / "signatures.json").read_text(encoding="utf-8")
)
PATH = "/scc/sd_get_progress"
BODY = b'{"taskId":"01j5t2qx82323pswaqykz9eq4"}'
SECRET = "a-secret-for-tests"

golden = pytest.mark.parametrize("request_", GOLDEN["requests"], ids=lambda made: made["made_by"])
relaxed = settings(max_examples=60, deadline=None)
visible = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40)
# No "?": queries have tests of their own.
paths = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="?"), max_size=40
).map("/{}".format)
stages = st.sampled_from(["", "RELEASE", "TEST", "PRE"])


def listed(request: dict[str, Any]) -> list[str]:
    return request["headers"]["x-ca-signature-headers"].split(",")


def resource(target: str) -> str:
    """Return the last line of the string to sign."""
    return string_to_sign("POST", target, {}, []).rsplit("\n", 1)[-1]


def headers(target: str = PATH, body: bytes = BODY, **changes: Any) -> dict[str, str]:
    values = {
        "access_key": "24000001",
        "secret_key": SECRET,
        "timestamp_ms": 1_700_000_000_000,
        "nonce": "n-1",
    }
    return signed_headers(target, body, **(values | changes))


def resigned(sent: dict[str, str], names: list[str]) -> dict[str, str]:
    """Return the request's headers with another list of signed ones, and a matching signature."""
    sent = sent | {"x-ca-signature-headers": ",".join(names)}
    return sent | {"x-ca-signature": sign(SECRET, string_to_sign("POST", PATH, sent, names))}


@golden
def test_string_to_sign_is_what_an_sdk_signed(request_: dict[str, Any]) -> None:
    """The string to sign equals, line by line, that of a vendor SDK's request."""
    text = string_to_sign(request_["method"], request_["target"], request_["headers"], listed(request_))
    assert text.split("\n") == request_["expected_string_to_sign"]


@golden
def test_sign_returns_the_signature_of_an_sdk(request_: dict[str, Any]) -> None:
    """The signature and the digest of the body equal those of a vendor SDK's request."""
    signature = sign(GOLDEN["secret_key"], "\n".join(request_["expected_string_to_sign"]))
    assert signature == request_["expected_signature"] == request_["headers"]["x-ca-signature"]
    assert content_md5(request_["body"].encode()) == request_["headers"]["content-md5"]


def test_content_md5_works_under_fips(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system under FIPS 140 allows MD5 only with usedforsecurity=False."""
    md5 = hashlib.md5

    def approved(data: bytes, *, usedforsecurity: bool = True) -> Any:
        if usedforsecurity:
            raise ValueError("disabled for FIPS")
        return md5(data, usedforsecurity=False)

    monkeypatch.setattr(hashlib, "md5", approved)
    assert headers()["content-md5"] == "O7/gf6myPVMrJBZE40B3Vw=="


@golden
def test_verify_accepts_an_sdks_request(request_: dict[str, Any]) -> None:
    """A vendor SDK's request verifies, and with no other secret."""
    parts = (request_["method"], request_["target"], request_["headers"], request_["body"].encode())
    assert verify(*parts, secret=GOLDEN["secret_key"]).fault is None
    assert verify(*parts, secret="another").fault == "signature mismatch"


@relaxed
@given(
    target=paths,
    body=st.binary(max_size=200),
    access_key=visible,
    secret=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    timestamp_ms=st.integers(0, 10**14),
    nonce=visible,
    stage=stages,
)
def test_signed_headers_verify(
    target: str, body: bytes, access_key: str, secret: str, timestamp_ms: int, nonce: str, stage: str
) -> None:
    """Signed headers verify, and every x-ca- header but the two of the signature is signed."""
    sent = signed_headers(
        target,
        body,
        access_key=access_key,
        secret_key=secret,
        timestamp_ms=timestamp_ms,
        nonce=nonce,
        stage=stage,
    )
    assert verify("POST", target, sent, body, secret=secret).fault is None
    covered = set(sent["x-ca-signature-headers"].split(","))
    assert covered == {n for n in sent if n.startswith("x-ca-")} - {
        "x-ca-signature",
        "x-ca-signature-headers",
    }
    assert sent.get("x-ca-stage", "") == stage


@relaxed
@given(data=st.data(), stage=stages)
def test_verify_refuses_a_changed_header(data: st.DataObject, stage: str) -> None:
    """Another character in a signed header or in the signature is refused."""
    sent = headers(stage=stage)
    name = data.draw(st.sampled_from(sorted(sent)))
    at = data.draw(st.integers(0, len(sent[name]) - 1))
    other = data.draw(st.characters(min_codepoint=0x20, max_codepoint=0x7E))
    assume(other != sent[name][at])
    changed = sent | {name: sent[name][:at] + other + sent[name][at + 1 :]}
    if name == "x-ca-signature-headers":
        # Spaces around a name have no meaning, and the verifier sorts the names.
        names = sorted(part.strip() for part in changed[name].split(","))
        assume(names != sorted(sent[name].split(",")))
    assert verify("POST", PATH, changed, BODY, secret=SECRET).fault is not None


@relaxed
@given(at=st.integers(0, len(BODY) - 1), byte=st.integers(0, 255))
def test_verify_refuses_a_changed_body(at: int, byte: int) -> None:
    """Another byte in the body is refused, because Content-MD5 is signed."""
    assume(BODY[at] != byte)
    changed = BODY[:at] + bytes([byte]) + BODY[at + 1 :]
    assert (
        verify("POST", PATH, headers(), changed, secret=SECRET).fault == "Content-MD5 does not match the body"
    )


@relaxed
@given(at=st.integers(0, len(PATH) - 1), other=st.characters(min_codepoint=0x21, max_codepoint=0x7E))
def test_verify_refuses_a_changed_path(at: int, other: str) -> None:
    """Another character in the path is refused."""
    assume(other != PATH[at])
    changed = PATH[:at] + other + PATH[at + 1 :]
    assert verify("POST", changed, headers(), BODY, secret=SECRET).fault == "signature mismatch"


@relaxed
@given(at=st.integers(0, len(SECRET) - 1), other=st.characters(exclude_categories=["Cs"]))
def test_verify_refuses_another_secret(at: int, other: str) -> None:
    """Another character in the secret is refused."""
    assume(other != SECRET[at])
    changed = SECRET[:at] + other + SECRET[at + 1 :]
    assert verify("POST", PATH, headers(), BODY, secret=changed).fault == "signature mismatch"


def test_verify_refuses_another_method() -> None:
    """The method is signed, in upper case."""
    assert verify("post", PATH, headers(), BODY, secret=SECRET).fault is None
    assert verify("PUT", PATH, headers(), BODY, secret=SECRET).fault == "signature mismatch"


@pytest.mark.parametrize("changes", [{}, {"x-ca-signature": ""}, {"x-ca-signature": "žluťoučký"}])
def test_verify_refuses_a_missing_or_strange_signature(changes: dict[str, str]) -> None:
    """A request without a signature, or with one that is not base64, is refused without an exception."""
    sent = headers()
    del sent["x-ca-signature"]
    assert verify("POST", PATH, sent | changes, BODY, secret=SECRET).fault == "signature mismatch"


@pytest.mark.parametrize("name", ["x-ca-key", "x-ca-nonce", "x-ca-timestamp"])
def test_verify_refuses_what_is_not_signed(name: str) -> None:
    """Key, nonce and timestamp must be among the signed headers, even if the signature is valid without."""
    sent = headers()
    names = [n for n in sent["x-ca-signature-headers"].split(",") if n != name]
    assert verify("POST", PATH, resigned(sent, names), BODY, secret=SECRET).fault == f"not signed: {name}"


def test_verify_names_everything_that_is_not_signed() -> None:
    """All three missing names are reported at once, in order."""
    verdict = verify("POST", PATH, resigned(headers(), []), BODY, secret=SECRET)
    assert verdict.fault == "not signed: x-ca-key, x-ca-nonce, x-ca-timestamp"


def test_verify_refuses_a_body_without_content_md5() -> None:
    """A body without Content-MD5 is refused although the signature is valid; an empty body needs none."""
    sent = {name: value for name, value in headers().items() if name != "content-md5"}
    sent = resigned(sent, sent["x-ca-signature-headers"].split(","))
    assert verify("POST", PATH, sent, BODY, secret=SECRET).fault == "body not covered by Content-MD5"
    assert verify("POST", PATH, sent, b"", secret=SECRET).fault is None


def test_verify_refuses_another_signature_method() -> None:
    """Only HmacSHA256 is supported, and it is the default."""
    sent = headers() | {"x-ca-signature-method": "HmacSHA1"}
    names = sent["x-ca-signature-headers"].split(",")
    assert (
        verify("POST", PATH, resigned(sent, names), BODY, secret=SECRET).fault
        == "unsupported signature method"
    )
    del sent["x-ca-signature-method"]
    names.remove("x-ca-signature-method")
    assert verify("POST", PATH, resigned(sent, names), BODY, secret=SECRET).fault is None


def test_verify_returns_its_string_to_sign() -> None:
    """The result contains the verifier's string to sign, as the real API gateway's error response does."""
    sent = headers()
    verdict = verify("POST", PATH, sent, BODY, secret="another")
    assert verdict.text == string_to_sign("POST", PATH, sent, sent["x-ca-signature-headers"].split(","))


def test_string_to_sign_leaves_an_absent_headers_line_empty() -> None:
    """An absent Accept, Content-MD5, Content-Type or Date leaves its line empty."""
    assert string_to_sign("get", "/path", {}, ["x-ca-key"]) == "GET\n\n\n\n\nx-ca-key:\n/path"
    sent = {"accept": "text/plain", "content-md5": "digest", "content-type": "text/html", "date": "today"}
    assert string_to_sign("GET", "/path", sent, []) == "GET\ntext/plain\ndigest\ntext/html\ntoday\n/path"


def test_string_to_sign_sorts_the_listed_headers() -> None:
    """Listed headers are sorted by name; headers with their own lines and the signature's are omitted."""
    own = ["Accept", "content-md5", "Content-Type", "date", "X-Ca-Signature", "x-ca-signature-headers"]
    sent = {"x-ca-stage": "TEST", "x-ca-key": "24000001"}
    text = string_to_sign("POST", "/path", sent, ["x-ca-stage", *own, "x-ca-key"])
    assert text == "POST\n\n\n\n\nx-ca-key:24000001\nx-ca-stage:TEST\n/path"


def test_string_to_sign_has_a_name_as_it_is_listed() -> None:
    """A listed name keeps its case in its line; its value is found in any case."""
    text = string_to_sign("POST", "/path", {"x-ca-key": "24000001"}, ["X-Ca-Key"])
    assert text == "POST\n\n\n\n\nX-Ca-Key:24000001\n/path"


@pytest.mark.parametrize(
    ("target", "signed"),
    [
        ("/path", "/path"),
        ("/path?", "/path"),
        ("/path?b=2&a=1", "/path?a=1&b=2"),
        ("/path?a=1&b=2&a=3", "/path?a=1&b=2"),
        ("/path?a=&b", "/path?a&b"),
        ("/path?a=%41+b", "/path?a=A b"),
        ("/path?B=1&a=2", "/path?B=1&a=2"),
        ("/path?a=b?c", "/path?a=b?c"),
    ],
)
def test_string_to_sign_takes_the_query_sorted_and_decoded(target: str, signed: str) -> None:
    """The query is signed decoded and sorted by key; of a repeated key the first value counts."""
    assert resource(target) == signed


@pytest.mark.parametrize("between", [", ", " ,", ",,", ", ,"])
def test_verify_reads_the_list_of_signed_headers_as_a_list(between: str) -> None:
    """Spaces around a name, empty list members (RFC 9110, 5.6.1) and the case of a name have no meaning."""
    names = ["X-Ca-Key", "X-Ca-Nonce", "X-Ca-Timestamp"]
    sent = resigned(headers(), names) | {"x-ca-signature-headers": between.join(names)}
    assert verify("POST", PATH, sent, BODY, secret=SECRET).fault is None


def test_verify_takes_a_missing_list_for_an_empty_one() -> None:
    """A request without a list is signed with the fixed lines only, and the missing names are reported."""
    sent = resigned(headers(), [])
    del sent["x-ca-signature-headers"]
    fault = verify("POST", PATH, sent, BODY, secret=SECRET).fault
    assert fault == "not signed: x-ca-key, x-ca-nonce, x-ca-timestamp"


def test_signed_headers_are_these_and_no_more() -> None:
    """The headers are those of an SDK; the stage is sent only if it is set."""
    sent = headers()
    assert len(sent.pop("x-ca-signature")) == 44
    assert sent == {
        "accept": "application/json; charset=utf-8",
        "content-type": "application/json; charset=utf-8",
        "content-md5": "O7/gf6myPVMrJBZE40B3Vw==",
        "x-ca-key": "24000001",
        "x-ca-nonce": "n-1",
        "x-ca-signature-headers": "x-ca-key,x-ca-nonce,x-ca-signature-method,x-ca-timestamp",
        "x-ca-signature-method": "HmacSHA256",
        "x-ca-timestamp": "1700000000000",
    }
    staged = headers(stage="PRE")
    assert staged["x-ca-stage"] == "PRE"
    assert "x-ca-stage" in staged["x-ca-signature-headers"].split(",")


def test_signed_headers_differ_with_every_nonce() -> None:
    """Two calls that differ in the nonce only have two signatures."""
    assert headers(nonce="n-1")["x-ca-signature"] != headers(nonce="n-2")["x-ca-signature"]
