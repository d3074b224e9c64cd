"""Certificate files that cannot be used: each mistake has a text of its own, for upstream and store."""

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from gateway.settings.errors import SettingsError
from gateway.settings.loading import load_with_sources
from gateway.settings.store_section import Store
from gateway.stores.valkey.failure_reasons import StoreFailure
from gateway.stores.valkey.servers import tls_context
from gateway.telemetry.redaction import Redactor
from gateway.upstream.create_transport import create_transport
from gateway.upstream.egress_proxy import find_proxy


class Pair(NamedTuple):
    """A certificate and its key, in PEM."""

    cert: bytes
    key: bytes


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Return a client's certificate and key."""
    issued = trustme.CA().issue_cert("client.example")
    return Pair(issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes())


def encrypted(pair: Pair, form: PrivateFormat) -> bytes:
    """Return the key with a passphrase."""
    key = load_pem_private_key(pair.key, None)
    return key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"passphrase"))


CASES: dict[str, tuple[str, Callable[[Pair], tuple[bytes, bytes]], str]] = {
    "swapped": (
        "client_cert_file",
        lambda pair: (pair.key, pair.cert),
        "has no certificate in PEM format; it has a private key",
    ),
    "twice the certificate": (
        "client_key_file",
        lambda pair: (pair.cert, pair.cert),
        "has no private key in PEM format; it has a certificate",
    ),
    "empty key": ("client_key_file", lambda pair: (pair.cert, b""), "has no private key in PEM format"),
    "DER": ("client_cert_file", lambda pair: (b"\x30\x82", pair.key), "has no certificate in PEM format"),
    "encrypted": (
        "client_key_file",
        lambda pair: (pair.cert, encrypted(pair, PrivateFormat.PKCS8)),
        "the private key is encrypted; it must have no passphrase",
    ),
    "encrypted, OpenSSL's old form": (
        "client_key_file",
        lambda pair: (pair.cert, encrypted(pair, PrivateFormat.TraditionalOpenSSL)),
        "the private key is encrypted; it must have no passphrase",
    ),
    "another key": (
        "client_cert_file",
        lambda pair: (pair.cert, trustme.CA().issue_cert("other.example").private_key_pem.bytes()),
        "does not belong to the private key in {key}",
    ),
    "half a certificate": (
        "client_cert_file",
        lambda pair: (pair.cert[:100], pair.key),
        "with the key in {key}: ",
    ),
}


def problem_of_upstream(environ: dict[str, str], file: Path | None = None) -> str:
    """Return what stops the start."""
    loaded = load_with_sources(file, environ)
    with pytest.raises(SettingsError) as told, loaded.naming_sources():
        create_transport(loaded.settings.upstream, proxy=None, redactor=Redactor(), environ=environ)
    [line] = told.value.mistakes
    return line


@pytest.mark.parametrize("case", CASES)
def test_client_certificate_mistakes_are_told_apart(tmp_path: Path, pair: Pair, case: str) -> None:
    """The line names source, setting, file and mistake."""
    name, make, problem = CASES[case]
    files = {"client_cert_file": tmp_path / "tls.crt", "client_key_file": tmp_path / "tls.key"}
    for file, content in zip(files.values(), make(pair), strict=True):
        file.write_bytes(content)
    problem = problem.format(key=files["client_key_file"])
    settings = tmp_path / "gateway.toml"
    settings.write_text("[upstream]\n" + "".join(f'{key} = "{file}"\n' for key, file in files.items()))
    line = 1 + list(files).index(name) + 1
    said = problem_of_upstream({}, settings)
    assert said.startswith(f'{settings}:{line}: upstream.{name} = "{files[name]}": {problem}')
    with pytest.raises(StoreFailure) as told:
        tls_context(Store.model_validate({"url": "valkeys://store.example", **files}))
    assert str(told.value).startswith(f"TLS: store.{name}: {files[name]}: {problem}")


@pytest.mark.parametrize(
    ("variable", "shown"),
    [
        ("SD_GATEWAY_UPSTREAM__CA_FILE", "SD_GATEWAY_UPSTREAM__CA_FILE: upstream.ca_file"),
        ("SSL_CERT_FILE", "SSL_CERT_FILE"),
    ],
)
@pytest.mark.parametrize("mistake", ["key", "empty", "missing", "directory", "loop"])
def test_authority_mistakes_are_told_apart(
    tmp_path: Path, pair: Pair, variable: str, shown: str, mistake: str
) -> None:
    """A bundle of authorities is named with the variable that has it."""
    file = tmp_path / "ca.pem"
    problem = {
        "key": "has no certificate in PEM format; it has a private key",
        "empty": "has no certificate in PEM format",
        "missing": "No such file or directory",
        "directory": "is not a regular file",
        "loop": "Too many levels of symbolic links",
    }[mistake]
    match mistake:
        case "key":
            file.write_bytes(pair.key)
        case "empty":
            file.touch()
        case "directory":
            file.mkdir()
        case "loop":
            file.symlink_to(file)
    assert problem_of_upstream({variable: str(file)}) == f'{shown} = "{file}": {problem}'


def test_a_key_in_the_certificate_file_is_usable(tmp_path: Path, pair: Pair) -> None:
    """One file may have both, with text around them."""
    file = tmp_path / "both.pem"
    file.write_bytes(b"Subject: client\n" + pair.key + pair.cert)
    settings = {"client_cert_file": file, "client_key_file": file, "url": "valkeys://store.example"}
    assert isinstance(tls_context(Store.model_validate(settings)), ssl.SSLContext)


def test_a_missing_socks_package_is_reported_with_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File, line and setting are named, and the login is not shown."""
    monkeypatch.setattr("gateway.upstream.egress_proxy.find_spec", lambda _: None)
    file = tmp_path / "gateway.toml"
    file.write_text('[upstream]\nproxy = "socks5://user:hidden-word@proxy.example:1080"\n')
    needs = "needs the extra socks (the package socksio): pip install 'httpx[socks]"
    for source, environ in ((f"{file}:2", {}), ("HTTPS_PROXY", {"HTTPS_PROXY": "socks5://p.example:1080"})):
        loaded = load_with_sources(None if environ else file, environ)
        with pytest.raises(SettingsError) as told, loaded.naming_sources():
            find_proxy(loaded.settings.upstream, environ)
        [line] = told.value.mistakes
        setting = "" if environ else 'upstream.proxy = "socks5://(hidden)@proxy.example:1080": '
        assert line.startswith(f"{source}: {setting}{needs}")
