"""Redaction: what is masked, and what is left unchanged."""

import base64
import html
import json
import random
import re
import unicodedata
from collections.abc import Callable
from typing import NoReturn
from urllib.parse import quote

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gateway.telemetry.redaction import MASK, Excerpt, Redactor
from gateway.upstream.signing import sign, signed_headers
from tests.support.hostile_text import hostile_texts

ACCESS_KEY = "LTAI5tFakeForTests"
SECRET_KEY = "fakeSecretForTests0123456789abcdef"
SIGNATURE = sign(SECRET_KEY, "whatever")
HOSTILE = hostile_texts(SECRET_KEY, SIGNATURE)

relaxed = settings(max_examples=60, deadline=None)
# Without brackets, as every credential: a bracket of the mask could complete the rest of a secret.
secrets = st.text(st.characters(exclude_characters="[]", exclude_categories=["Cs"]), min_size=6, max_size=40)


@pytest.fixture
def redactor() -> Redactor:
    """Return a redactor with a key pair."""
    redactor = Redactor()
    redactor.add_secrets(ACCESS_KEY, SECRET_KEY)
    return redactor


def test_redactor_keeps_ordinary_text(redactor: Redactor) -> None:
    """Text without a secret is unchanged, including header names and digests of bodies."""
    text = (
        "POST /scc/sd_get_progress task 01j5t2qx82323pswaqykz9eq4 Content-MD5: O7/gf6myPVMrJBZE40B3Vw== "
        "x-ca-signature-headers: x-ca-key,x-ca-nonce,x-ca-timestamp i_66c5ad0babc5ab0023d2e1f6"
    )
    assert redactor(text) == text
    assert Redactor()(text) == text
    assert redactor("") == ""


def test_redactor_masks_secrets_anywhere(redactor: Redactor) -> None:
    """A secret is masked at the start, in the middle, at the end, within a word and when repeated."""
    text = f"{SECRET_KEY} and x{ACCESS_KEY}y and {SECRET_KEY}{SECRET_KEY}\n{ACCESS_KEY}"
    assert redactor(text) == f"{MASK} and x{MASK}y and {MASK}{MASK}\n{MASK}"


def test_redactor_masks_each_secret_once_it_is_added(redactor: Redactor) -> None:
    """A new secret is masked once it is added, and the old one still is: it may be valid."""
    assert redactor("the-next-secret") == "the-next-secret"
    redactor.add_secrets("the-next-secret")
    assert redactor(f"the-next-secret {SECRET_KEY}") == f"{MASK} {MASK}"


def test_redactor_masks_the_longer_of_two_secrets_with_one_prefix() -> None:
    """If one secret begins with another, nothing of the longer one remains."""
    redactor = Redactor()
    redactor.add_secrets("abcdef")
    redactor.add_secrets("abcdef-and-more")
    assert redactor("abcdef-and-more abcdef") == f"{MASK} {MASK}"


def test_redactor_matches_secrets_literally() -> None:
    """Characters with a meaning in regular expressions are matched literally."""
    redactor = Redactor()
    redactor.add_secrets("a.c+e(g\\")
    assert redactor("a.c+e(g\\ abcdeg") == f"{MASK} abcdeg"


@pytest.mark.parametrize("secret", ["a b c d", "a\tb\n\nc", "a\\\\\\\\b", "%41%42%43", "&#65;&#66;"])
def test_redactor_masks_a_secret_that_no_view_contains(secret: str) -> None:
    """A secret that is mostly white space, or decodes to few characters, is masked literally."""
    redactor = Redactor()
    redactor.add_secrets(secret, "another-secret")
    for text in ("in {} text", "in {} 100 % of \\ text", "in {} & text\u3000"):
        assert redactor(text.format(secret)) == text.format(MASK)
    assert redactor("abc d AB ABC") == "abc d AB ABC"


@pytest.mark.parametrize("short", ["", "a", "12345"])
def test_redactor_ignores_short_strings(short: str) -> None:
    """Strings shorter than 6 characters occur in ordinary text and are not masked."""
    redactor = Redactor()
    redactor.add_secrets(short)
    assert redactor("a cat, 12345 times") == "a cat, 12345 times"


@pytest.mark.parametrize(
    "message",
    [
        "Invalid Signature, Server StringToSign:`POST#application/json##x-ca-key:24000001#/scc/x`",
        "invalid signature, server stringtosign: POST\n\nx-ca-key:24000001\n/scc/x",
        "Server String-To-Sign : `GET#24000001`",
        "string to sign: 24000001",
        '{"string_to_sign": "POST\\nx-ca-key:24000001"}',
    ],
)
def test_redactor_masks_a_string_to_sign_to_its_end(message: str) -> None:
    """The API gateway's rejection of a signature may quote an unknown key: the whole quote is masked."""
    clean = Redactor()(message)
    assert "24000001" not in clean
    assert "/scc/x" not in clean
    assert clean.endswith(MASK)


@pytest.mark.parametrize("name", ["x-ca-key", "X-Ca-Signature", "x-ca-nonce"])
@pytest.mark.parametrize(
    "shape",
    [
        "{}:not-known-yet",
        "{}: not-known-yet",
        "{} = not-known-yet",
        "{}=not-known-yet",
        "{{'{}': 'not-known-yet'}}",
        '{{"{}":"not-known-yet"}}',
        "[('{}', 'not-known-yet')]",
        "[(b'{}', b'not-known-yet')]",
        "{{b'{}': b'not-known-yet'}}",
        "a#{}:not-known-yet#b",
        "{}:not-known-yet\r\nHost: h",
    ],
)
def test_redactor_masks_authentication_headers(shape: str, name: str) -> None:
    """Key, signature and nonce are recognized by header name, in any representation of headers."""
    text = shape.format(name)
    assert Redactor()(text) == text.replace("not-known-yet", MASK)


def test_redactor_masks_dumps_of_a_signed_request() -> None:
    """No credential of a signed request remains, even if the redactor does not know its key pair."""
    headers = signed_headers(
        "/p", b"{}", access_key=ACCESS_KEY, secret_key=SECRET_KEY, timestamp_ms=1, nonce="nonce-of-this-call"
    )
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    for dump in (repr(headers), repr(encoded), "\n".join(f"{n}: {v}" for n, v in headers.items())):
        clean = Redactor()(dump)
        for secret in (ACCESS_KEY, headers["x-ca-signature"], "nonce-of-this-call"):
            assert secret not in clean
        assert headers["content-md5"] in clean


@pytest.mark.parametrize("shape", ["{}", "got {}.", "'{}'", "a={};b", "({})"])
def test_redactor_masks_signatures_by_their_pattern(shape: str) -> None:
    """Base64 of 32 bytes is masked as a signature anywhere."""
    assert Redactor()(shape.format(SIGNATURE)) == shape.format(MASK)


@pytest.mark.parametrize("text", ["A" * 43, "A" * 44 + "=", "A" * 43 + "==", "A" * 42 + "="])
def test_redactor_keeps_other_base64(text: str) -> None:
    """Base64 of any other length is not a signature."""
    assert Redactor()(text) == text


@relaxed
@given(secret=secrets, text=st.lists(st.text() | st.none(), max_size=6))
def test_redactor_leaves_no_known_secret(secret: str, text: list[str | None]) -> None:
    """The result does not contain the secret, in any surroundings and for any number of occurrences."""
    assume(secret not in MASK)
    redactor = Redactor()
    redactor.add_secrets(secret)
    assert secret not in redactor("".join(secret if part is None else part for part in text))


@relaxed
@given(known=st.lists(secrets, max_size=4), secret=secrets)
def test_redactor_masks_each_of_many_secrets(known: list[str], secret: str) -> None:
    """Each of many secrets is masked as a whole, independent of the order in which they were added."""
    assume(all(one not in MASK for one in [*known, secret]))
    redactor = Redactor()
    redactor.add_secrets(*known)
    redactor.add_secrets(secret)
    for one in [*known, secret]:
        assert one not in redactor(f"<{one}>")


# --- encodings --------------------------------------------------------------------------------------------


def percent(text: str, form: str = "%{:02X}") -> str:
    """Return the text with every character escaped."""
    return "".join(form.format(ord(char)) for char in text)


def in_base64(before: int, *, url_safe: bool = False, padded: bool = True) -> Callable[[str], str]:
    """Return an encoder for a secret that starts after `before` bytes."""

    def encode(secret: str) -> str:
        encoder = base64.urlsafe_b64encode if url_safe else base64.b64encode
        text = encoder(b"u" * before + secret.encode() + b":more").decode()
        return text if padded else text.rstrip("=")

    return encode


def wrapped(text: str) -> str:
    """Return the text in lines of 7 characters."""
    return "\n".join(text[at : at + 7] for at in range(0, len(text), 7))


ENCODINGS: dict[str, Callable[[str], str]] = {
    "lower case": str.lower,
    "upper case": str.upper,
    "swapped case": str.swapcase,
    "percent": percent,
    "percent, lower": lambda secret: percent(secret, "%{:02x}"),
    "percent, half of it": lambda secret: percent(secret[:7]) + secret[7:-3] + percent(secret[-3:]),
    "percent, twice": lambda secret: percent(secret, "%25{:02X}"),
    "percent, of lower case": lambda secret: percent(secret.lower()),
    "percent, in lines": lambda secret: wrapped(percent(secret)),
    "percent, special characters": lambda secret: quote(secret, safe=""),
    "JSON": lambda secret: percent(secret, "\\u{:04x}"),
    "JSON in JSON": lambda secret: percent(secret, "\\\\u{:04X}"),
    "JSON, solidus": lambda secret: secret.replace("/", "\\/"),
    "Python": lambda secret: percent(secret, "\\x{:02x}"),
    "Python, long": lambda secret: percent(secret, "\\U{:08x}"),
    "JavaScript": lambda secret: percent(secret, "\\u{{{:x}}}"),
    "HTML, decimal": lambda secret: percent(secret, "&#{};"),
    "HTML, hexadecimal": lambda secret: percent(secret, "&#x{:x};"),
    "HTML, no semicolons": lambda secret: percent(secret, "&#{}"),
    "HTML in JSON": lambda secret: percent(secret, "\\u0026#{};"),
    "HTML, names": html.escape,
    "hex": lambda secret: secret.encode().hex(),
    "hex, upper": lambda secret: secret.encode().hex().upper(),
    "hex, colons": lambda secret: secret.encode().hex(":"),
    "hex, points": lambda secret: secret.encode().hex("."),
    "hex, underscores": lambda secret: secret.encode().hex("_"),
    "hex, spaces": lambda secret: secret.encode().hex(" ").upper(),
    "hex, list": lambda secret: ", ".join(f"0x{byte:02x}" for byte in secret.encode()),
    "hex, list of upper case": lambda secret: ",".join(f"0X{byte:02X}" for byte in secret.encode()),
    "hex, slashes": lambda secret: secret.encode().hex("/"),
    "hex, bars": lambda secret: secret.encode().hex("|"),
    "hex, semicolons": lambda secret: secret.encode().hex(";"),
    "hex of upper case": lambda secret: secret.upper().encode().hex(),
    "hex, in lines": lambda secret: wrapped(secret.encode().hex()),
    "spaces": " ".join,
    "tabs": "\t".join,
    "a line break": lambda secret: f"{secret[:3]}\r\n  {secret[3:]}",
    "a wide space": lambda secret: f"{secret[:3]}\u3000{secret[3:]}",
    "an em space": "\u2003".join,
    "a thin space": lambda secret: f"{secret[:3]}\u2009{secret[3:]}",
    "an escaped wide space": lambda secret: f"{secret[:3]}\\u2028{secret[3:4]}\\u200b\\ufeff{secret[4:]}",
    "percent, a wide space": lambda secret: f"{secret[:3]}%E2%80%83{secret[3:]}",
    "zero bytes": "\0".join,
    "unit separators": "\x1f".join,
    "soft hyphens": "\xad".join,
    "word joiners": "\u2060".join,
    "an escaped line break": lambda secret: f"{secret[:3]}\\n{secret[3:]}",
    **{
        f"base64, {before} before{', URL-safe' * url_safe}{', padded' * padded}": (
            in_base64(before, url_safe=url_safe, padded=padded)
        )
        for before in (0, 1, 2, 5)
        for url_safe in (False, True)
        for padded in (False, True)
    },
    "base64, lower case": lambda secret: in_base64(1)(secret).lower(),
    "base64, upper case": lambda secret: in_base64(2, url_safe=True)(secret).upper(),
    "base64, in lines": lambda secret: wrapped(in_base64(4)(secret)),
    "base64, percent": lambda secret: quote(in_base64(4)(secret), safe=""),
    "base64, alone": lambda secret: base64.b64encode(secret.encode()).decode(),
    "base64 of UTF-16": lambda secret: base64.b64encode(secret.encode("utf-16-le")).decode(),
    "base64 of UTF-16, unaligned": lambda secret: base64.b64encode(f"a{secret}".encode("utf-16")).decode(),
    "base64 of UTF-16, big endian": lambda secret: base64.b64encode(secret.encode("utf-16-be")).decode(),
}


# only for ASCII
NOT_FOR_ALL = ("JSON", "percent, half", "percent, of", "Python", "JavaScript", "HTML", "hex of")


@pytest.mark.parametrize(
    ("encoding", "secret"),
    [
        (encoding, secret)
        for secret in (ACCESS_KEY, SECRET_KEY, 'a+b/c=d&e<f"g~h', "sixsix", "p\u00e4ssw\u00f6rter")
        for encoding in ENCODINGS
        if secret.isascii() or not encoding.startswith(NOT_FOR_ALL)
    ],
)
def test_redactor_masks_a_secret_in_every_encoding(encoding: str, secret: str) -> None:
    """No form of the secret remains, and the surrounding text does."""
    redactor = Redactor()
    redactor.add_secrets(secret)
    encoded = ENCODINGS[encoding](secret)
    for long in ("", "." * 20_000):
        clean = redactor(f"before, {encoded}, after{long}")
        assert encoded not in clean
        assert MASK in clean
        if not long and "base64" in encoding:  # which may extend before and after the secret
            assert clean.startswith("before, ")
            assert clean.endswith(", after")
        elif not long:
            assert re.sub(r"\\|0[xX]|(?<=\])}", "", clean.replace(r"\u{", "")) == f"before, {MASK}, after"


@pytest.mark.parametrize("secret", [SECRET_KEY, "p\u00e4ssw\u00f6rter"])
def test_redactor_masks_a_secret_with_invisible_characters(secret: str) -> None:
    """Any invisible character of Unicode may separate the characters of a secret, also as an escape."""
    redactor = Redactor()
    redactor.add_secrets(secret)
    invisible = [
        char
        for char in map(chr, range(0x11_0000))
        if char.isspace() or unicodedata.category(char) in {"Cc", "Cf", "Mn"}
    ]
    for char in invisible:
        for separator in (char, json.dumps(char)[1:-1], quote(char), f"&#{ord(char)};"):
            assert redactor(f"of {secret[:3]}{separator}{secret[3:]}.") == f"of {MASK}."
    assert len(invisible) > 1000


# For each kind of encoding: the parts of the encoded secret, and what may stand between them. Hexadecimal has
# any separator without a digit of its own.
splitters = st.characters(exclude_categories=["Cs"]).filter(lambda char: not "!" <= char <= "~")
hex_splitters = (
    st.characters(exclude_categories=["Cs"])
    .filter(lambda char: char not in "123456789abcdefABCDEF\\%&")
    .flatmap(lambda char: st.sampled_from([char, f"{char}0x", f"{char} U+00", f"{char}{char}"]))
)


def in_hex(secret: bytes) -> list[str]:
    """Return the two digits of each byte."""
    return [f"{byte:02x}" for byte in secret]


SPLIT: dict[str, tuple[Callable[[bytes], list[str]], st.SearchStrategy[str]]] = {
    "text": (lambda secret: list(secret.decode()), splitters),
    "base64": (lambda secret: list(base64.b64encode(secret).decode()), splitters),
    "base64, URL-safe": (lambda secret: list(base64.urlsafe_b64encode(b"u" + secret).decode()), splitters),
    "base64 of UTF-16": (lambda s: list(base64.b64encode(s.decode().encode("utf-16")).decode()), splitters),
    "hex": (in_hex, hex_splitters),
    "hex, upper": (lambda secret: [digits.upper() for digits in in_hex(secret)], hex_splitters),
    "hex of UTF-16": (lambda secret: in_hex(secret.decode().encode("utf-16")), hex_splitters),
}


def assert_is_found(redactor: Redactor, signature: str, encoded: str) -> None:
    """Assert that a text is masked in a rejection, and refused in a success, whatever JSON escapes it has."""
    clean = redactor(f"before <{encoded}> after")
    assert encoded not in clean
    assert MASK in clean
    for ascii_only in (True, False):
        body = json.dumps({"message": encoded}, ensure_ascii=ascii_only).encode()
        assert redactor.may_contain_credential(body, signature)
        assert redactor.contains_credential(body)
        assert redactor(body.decode()) != body.decode()


@pytest.mark.parametrize("name", SPLIT)
@relaxed
@given(data=st.data(), secret=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=12))
def test_redactor_finds_every_encoding_with_any_separator(
    name: str, data: st.DataObject, secret: str
) -> None:
    """No separator hides an encoded secret, neither in a rejection nor in a success."""
    assume(len(re.sub(r"[\\=%&]", "", secret)) == len(secret))
    split, separators = SPLIT[name]
    redactor = Redactor()
    redactor.add_credentials(secret)
    assume(secret.lower() not in MASK)
    assert_is_found(redactor, SIGNATURE, data.draw(separators).join(split(secret.encode())))


@pytest.mark.parametrize("name", [name for name in SPLIT if name != "text" and "UTF-16" not in name])
@relaxed
@given(data=st.data(), key=st.text())
def test_redactor_finds_the_bytes_of_a_signature(name: str, data: st.DataObject, key: str) -> None:
    """A signature is also found if the upstream encodes its 32 bytes in another way."""
    signature = sign(key, "whatever")
    split, separators = SPLIT[name]
    encoded = data.draw(separators).join(split(base64.b64decode(signature)))
    assert_is_found(Redactor().for_call(signature), signature, encoded)
    assert Redactor().may_contain_credential(encoded.encode(), signature)


@pytest.mark.parametrize(
    "encode", [quote, lambda secret: quote(secret).lower(), lambda s: json.dumps(s)[1:-1]]
)
def test_redactor_masks_a_secret_without_ascii(encode: Callable[[str], str]) -> None:
    """Views contain only ASCII, so the escapes of other characters are searched literally."""
    redactor, secret = Redactor(), "\u5bc6\u7801\u5bc6\u7801\u53e3\u4ee4"
    redactor.add_secrets(secret)
    assert redactor(f"of {encode(secret)}.") == f"of {MASK}."


def test_redactor_rejects_responses_only_for_credentials() -> None:
    """A response may contain a store password, and text that only looks like a signature."""
    redactor = Redactor()
    redactor.add_secrets("running", SECRET_KEY)
    redactor.add_credentials(ACCESS_KEY, SECRET_KEY)
    for encode in ENCODINGS.values():
        body = f'{{"a":"{encode(SECRET_KEY)}"}}'.encode()
        assert redactor.may_contain_credential(body, SIGNATURE)
        assert redactor.contains_credential(body)
    other = sign(SECRET_KEY, "another")
    for text in ("running", other, f"x-ca-key: {other}", SECRET_KEY[:-1]):
        assert not redactor.contains_credential(f'{{"a":"{text}"}}'.encode())


@pytest.mark.parametrize("number", range(30))
def test_redactor_of_a_request_masks_its_signature(redactor: Redactor, number: int) -> None:
    """Each form of the signature is suspected, rejected and masked; other redactors do not know it."""
    signature = sign(SECRET_KEY, str(number))
    of_call = redactor.for_call(signature)
    for name, encode in ENCODINGS.items():
        text = f"before, {encode(signature)}, after"
        assert redactor.may_contain_credential(text.encode(), signature)
        assert of_call.contains_credential(text.encode()), name
        assert MASK in of_call(text), name
    # It is also suspected if it is truncated.
    for cut in (signature[:6], signature[:6].encode().hex(), base64.b64decode(signature)[:6].hex()):
        assert redactor.may_contain_credential(cut.encode(), signature)
        assert MASK in of_call(f"of {cut}")
    assert not redactor.contains_credential(signature.encode())


def test_redactor_masks_the_beginning_of_a_secret_with_zeros_in_hexadecimal() -> None:
    """The digit 0 is not compared, so 6 characters may have fewer than 12 digits."""
    redactor = Redactor()
    redactor.add_secrets("p0p0p0-and-more")
    assert redactor(f"Wrong key {b'p0p0p0-'.hex()}") == f"Wrong key {MASK}"
    assert redactor("Wrong key 737") == "Wrong key 737"


@pytest.mark.parametrize("encoding", ["{}", "{}...", "'{}'", "({}\u2026)", '"{}"}}'])
@pytest.mark.parametrize("length", [6, 9, len(SECRET_KEY) - 1])
def test_redactor_masks_a_truncated_secret(redactor: Redactor, length: int, encoding: str) -> None:
    """The beginning of a secret at the end of a text is masked in any encoding, from 6 characters on."""
    cut = SECRET_KEY[:length]
    assert redactor(f"Wrong key {encoding.format(cut)}") == f"Wrong key {encoding.format(MASK)}"
    for coded in (cut.encode().hex(), percent(cut), " ".join(cut), f"{cut[:3]}\\u{ord(cut[3]):04x}{cut[4:]}"):
        assert redactor(f"Wrong key {encoding.format(coded)}") == f"Wrong key {encoding.format(MASK)}"
    text = base64.b64encode(SECRET_KEY.encode()).decode()[: length + 2]
    assert redactor(f"Wrong key {encoding.format(text)}") == f"Wrong key {encoding.format(MASK)}"
    assert redactor(f"Wrong {cut} key") == f"Wrong {cut} key"
    assert redactor(f"Wrong key {SECRET_KEY[:5]}") == f"Wrong key {SECRET_KEY[:5]}"


@pytest.mark.parametrize(
    "text",
    [
        "Throttled by APP Flow Control, 100 % of 20 calls per second; retry in 1.5 s",
        '{"status": 20, "errMessage": "\\u8bf7\\u6c42 failed", "path": "C:\\\\temp\\\\new", "n": 123456789}',
        "GET /v1/progress?taskId=a%2Fb&api=sd%20x HTTP/1.1, 0123456789abcdef, \u8bf7\u6c42\u3000\u3001",
        "data:image/png;base64," + base64.b64encode(random.Random(1).randbytes(600)).decode(),
        random.Random(1).randbytes(50_000).hex(),
        ", ".join(f"0x{byte:02x}" for byte in random.Random(1).randbytes(10_000)),
        json.dumps([random.Random(number).random() for number in range(1000)]),
        base64.b64encode(random.Random(1).randbytes(50_000)).decode(),
        "= == === %%% %4 \\ \\u00 &#; &#x; &#99999999; %",
        "a" * 50_000,
    ],
)
def test_redactor_keeps_text_that_looks_encoded(redactor: Redactor, text: str) -> None:
    """Escapes, base64, hexadecimal and numbers without a secret are unchanged."""
    assert redactor(text) == text


@pytest.mark.parametrize("name", HOSTILE)
def test_redactor_takes_linear_time(redactor: Redactor, name: str) -> None:
    """Five adversarial mebibytes take seconds; a quadratic algorithm would take hours."""
    for _ in range(5):
        assert SECRET_KEY not in redactor(HOSTILE[name])


@pytest.mark.parametrize(
    "name",
    [
        "headers with backslashes",
        "headers with spaces",
        "beginnings of the secret",
    ],
)
def test_redactor_locates_only_what_it_masks(
    redactor: Redactor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that only resembles a secret is not read byte by byte, which takes 100 times as long."""

    def refuse(_: bytes) -> NoReturn:
        pytest.fail("the text is read byte by byte")

    monkeypatch.setattr("gateway.telemetry.redaction.decode_with_positions", refuse)
    text = HOSTILE[name][:30_000] + " and so on"
    assert redactor(text) == text


@pytest.mark.parametrize("rest", [" ", "\\", "%25", "&#0000", "\\n", "&#x", "fakese", "f "])
def test_redactor_locates_matches_in_little_time(redactor: Redactor, rest: str) -> None:
    """A text that may contain a secret is read byte by byte only once."""
    text = (SECRET_KEY[:6] + rest * 16_000)[:16_000]
    for _ in range(20):
        redactor(text)


ascii_secrets = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="[]%\\&;"), min_size=6
)
escapes = st.sampled_from(["{}", "%{:02X}", "%25{:02x}", "\\u{:04x}", "\\x{:02X}", "&#{};", "&#x{:X};"])
gaps = st.sampled_from(["", "", "", " ", "\n", "\t\t", "\\n", "\u3000", "%20"])


@relaxed
@given(data=st.data(), secret=ascii_secrets, before=st.text(), after=st.text())
def test_redactor_masks_mixed_encodings(data: st.DataObject, secret: str, before: str, after: str) -> None:
    """Each character may have a different escape and case, with white space between any two."""
    pieces = []
    for char in secret:
        shown = data.draw(st.sampled_from([char, char.swapcase()]))
        escape = data.draw(escapes)
        pieces.append(shown if escape == "{}" else escape.format(ord(shown)))
    encoded = "".join(piece + data.draw(gaps) for piece in pieces[:-1]) + pieces[-1]
    redactor = Redactor()
    redactor.add_secrets(secret)
    assume(secret.lower() not in MASK)
    clean = redactor(f"{before} <{encoded}> {after}")
    assert encoded not in clean
    assert MASK in clean


@relaxed
@given(secret=st.binary(min_size=6, max_size=30), before=st.binary(), after=st.binary())
def test_redactor_masks_base64_at_any_offset(secret: bytes, before: bytes, after: bytes) -> None:
    """At any of the three offsets in a group, no base64 digit with bits of the secret remains."""
    text = f"Sec{secret.hex()}"
    redactor = Redactor()
    redactor.add_secrets(text)
    coded = base64.b64encode(before + text.encode() + after).decode()
    assume(
        not re.search(r"(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{43}=|^.{43}=", coded)
    )  # the pattern of a signature
    clean = redactor(f"Basic {coded}")
    first, last = len(before) * 8 // 6, -(-(len(before) + len(text)) * 8 // 6)
    assert clean == f"Basic {coded[:first]}{MASK}{coded[last:]}"


def test_excerpts_are_texts_with_a_limit() -> None:
    """An excerpt is a string, also for code that does not know excerpts."""
    excerpt = Excerpt("abc", 2)
    assert (excerpt, excerpt.limit, json.dumps(excerpt)) == ("abc", 2, '"abc"')
