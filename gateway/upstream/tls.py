"""The TLS context of connections to the upstream, which follows its certificate files when they change.

The certificate authorities are those of `upstream.ca_file`; without it those of SSL_CERT_FILE and
SSL_CERT_DIR, as in OpenSSL; without them the public ones of the package certifi.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import structlog

from gateway.settings.certificates import CertificateFileError, present, trust
from gateway.settings.model import Upstream

log = structlog.get_logger(__name__)

# A file's identity: name, device, inode, size and time of the last change, in nanoseconds.
_State = tuple[str, int, int, int, int]


class TlsFiles:
    """Returns the context for new connections. Open connections keep theirs until they are closed.

    Raises: CertificateFileError if a file cannot be used.
    """

    def __init__(self, settings: Upstream, environ: Mapping[str, str]) -> None:
        self._ca_name = _ca_name(settings, environ)
        self._ca_file = settings.ca_file or _path(environ, "SSL_CERT_FILE")
        # As in OpenSSL, the variable may list several folders.
        folders = "" if settings.ca_file else environ.get("SSL_CERT_DIR", "")
        self._ca_folders = [Path(folder) for folder in folders.split(os.pathsep) if folder]
        self._cert_file = settings.client_cert_file
        self._key_file = settings.client_key_file
        self._state = tuple(self._states())
        self._context = self._load()

    def context(self) -> ssl.SSLContext:
        """Return the context of the present files. If these cannot be used, the previous context stays."""
        state = tuple(self._states())
        if state != self._state:
            self._state = state
            try:
                self._context = self._load()
            except CertificateFileError as exc:
                log.warning("tls_files_unreadable", reason=str(exc))
            else:
                log.info("tls_files_loaded")
        return self._context

    def _states(self) -> Iterator[_State]:
        for path in (self._ca_file, *self._ca_folders, self._cert_file, self._key_file):
            if path is not None:
                try:
                    found = path.stat()
                except OSError:
                    yield str(path), 0, 0, 0, 0
                else:
                    yield str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _load(self) -> ssl.SSLContext:
        if self._ca_file is None and not self._ca_folders:
            context = httpx.create_ssl_context(trust_env=False)
        else:
            context = trust(self._ca_file, self._ca_folders, name=self._ca_name)
        if self._cert_file is not None and self._key_file is not None:
            present(context, self._cert_file, self._key_file)
        return context


def _ca_name(settings: Upstream, environ: Mapping[str, str]) -> str:
    if settings.ca_file:
        return "ca_file"
    return "SSL_CERT_FILE" if environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"


def _path(environ: Mapping[str, str], name: str) -> Path | None:
    value = environ.get(name, "")
    return Path(value) if value else None
