"""Loads the certificate files of the settings, and says which of them cannot be used, and why.

OpenSSL reports most mistakes with files by the same texts. So the PEM labels of a file are read first: they
show that a file has a key in place of a certificate, or that a key is encrypted.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Sequence
from pathlib import Path

from gateway.settings.secret_files import describe_read_error, read_bundle

_LABEL = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----")
_CERTIFICATES = {b"CERTIFICATE", b"TRUSTED CERTIFICATE", b"X509 CERTIFICATE"}
_HASHED_NAME = re.compile(r"[0-9a-f]{8}\.[0-9]+")  # by which OpenSSL finds an authority in a folder
_ENCRYPTED = (b"-----BEGIN ENCRYPTED PRIVATE KEY-----", b"Proc-Type: 4,ENCRYPTED")


class CertificateFileError(ValueError):
    """A file cannot be used. `name` is the setting or variable with its path; `problem` says why."""

    def __init__(self, name: str, path: Path, problem: str) -> None:
        super().__init__(f"{name}: {path}: {problem}")
        self.name = name
        self.path = path
        self.problem = problem


def trust(file: Path | None, folders: Sequence[Path] = (), *, name: str) -> ssl.SSLContext:
    """Return a client's context that trusts the authorities in a file, and in folders with hashed names.

    Without both, it trusts those of the system. Raises: CertificateFileError.
    """
    joined = os.pathsep.join(map(str, folders))
    path = file or Path(joined)
    if file is not None:
        _require_certificate(name, file)
    elif folders:
        _require_hashed_name(name, folders, path)
    try:
        return ssl.create_default_context(cafile=file, capath=joined or None)
    except ssl.SSLError as exc:
        raise CertificateFileError(name, path, _reason(exc)) from exc
    except OSError as exc:
        raise CertificateFileError(name, path, describe_read_error(exc)) from exc


def present(context: ssl.SSLContext, cert_file: Path, key_file: Path) -> None:
    """Let a context present a client certificate. Raises: CertificateFileError."""
    cert, key = "client_cert_file", "client_key_file"
    _require_certificate(cert, cert_file)
    content = _read(key, key_file)
    if any(mark in content for mark in _ENCRYPTED):
        raise CertificateFileError(key, key_file, "the private key is encrypted; it must have no passphrase")
    labels = _LABEL.findall(content)
    if not any(label.endswith(b"PRIVATE KEY") for label in labels):
        found = "; it has a certificate" if _CERTIFICATES & {*labels} else ""
        raise CertificateFileError(key, key_file, f"has no private key in PEM format{found}")
    try:
        # Without a password, OpenSSL would ask for one on the terminal, and wait.
        context.load_cert_chain(cert_file, key_file, password=lambda: "")
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            problem = f"does not belong to the private key in {key_file}"
            raise CertificateFileError(cert, cert_file, problem) from exc
        raise CertificateFileError(cert, cert_file, f"with the key in {key_file}: {_reason(exc)}") from exc
    except OSError as exc:
        raise CertificateFileError(cert, cert_file, describe_read_error(exc)) from exc


def _require_certificate(name: str, file: Path) -> None:
    labels = _LABEL.findall(_read(name, file))
    if not _CERTIFICATES & {*labels}:
        found = "; it has a private key" if any(label.endswith(b"PRIVATE KEY") for label in labels) else ""
        raise CertificateFileError(name, file, f"has no certificate in PEM format{found}")


def _require_hashed_name(name: str, folders: Sequence[Path], path: Path) -> None:
    # OpenSSL accepts any folder, even a missing one, and later trusts no certificate.
    problem = 'has no certificate with a hashed name: run "openssl rehash" on it'
    for folder in folders:
        try:
            if any(_HASHED_NAME.fullmatch(entry.name) for entry in folder.iterdir()):
                return
        except OSError as exc:
            problem = describe_read_error(exc)
    raise CertificateFileError(name, path, problem)


def _read(name: str, file: Path) -> bytes:
    try:
        return read_bundle(file)
    except OSError as exc:
        raise CertificateFileError(name, file, describe_read_error(exc)) from exc
    except ValueError as exc:
        raise CertificateFileError(name, file, str(exc).rpartition(": ")[2]) from exc


def _reason(error: ssl.SSLError) -> str:
    # OpenSSL's reasons are in capitals: NOT_ENOUGH_DATA, EE_KEY_TOO_SMALL.
    return (error.reason or "not a certificate in PEM format").replace("_", " ").lower()
