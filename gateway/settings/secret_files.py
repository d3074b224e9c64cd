"""Reads secret files and certificate bundles, and accepts only small regular files.

Opening a FIFO blocks until there is a writer, and a device may be endless. A wrong mount can put either in
the place of a secret.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

from gateway.settings.secret_text import UTF16_MARKS, SecretText, decode_secret

MOST_BYTES = 65_536
_MOST_CERTIFICATE_BYTES = 4 * 1024 * 1024  # a bundle of all public certificate authorities has 300 KB


def read_secret(file: Path) -> SecretText:
    """Return the secret in a file. `secret_text.py` has the rule.

    Raises:
        OSError: The file cannot be read; the error names it.
        ValueError: The file is not a regular file or too large, or has no valid secret; the message names it.
    """
    return decode_secret(_read(file, most=MOST_BYTES), source=str(file))


def read_secret_line(stream: IO[bytes], *, source: str) -> SecretText:
    """Return the secret in the first line of a stream. Raises: ValueError, if it is too large or invalid."""
    content = stream.readline(MOST_BYTES + 1)
    if content.startswith(UTF16_MARKS):  # its line end is not a single byte
        content += stream.read(MOST_BYTES)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{source}: is larger than {MOST_BYTES} bytes")
    return decode_secret(content, source=source)


def read_bundle(file: Path) -> bytes:
    """Return the content of a certificate bundle, without blocking.

    Raises:
        OSError: The file cannot be read; the error names it.
        ValueError: The file is not a regular file or too large; the message names it.
    """
    return _read(file, most=_MOST_CERTIFICATE_BYTES)


def describe_read_error(error: OSError) -> str:
    """Return why a file cannot be read. For a missing permission, the text names the user who needs it."""
    if isinstance(error, PermissionError):
        return f"permission denied; user {os.geteuid()} must be able to read the file and enter its folder"
    return error.strerror or str(error)


def _read(file: Path, *, most: int) -> bytes:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError as exc:  # a NUL in the name
        raise ValueError(f"{str(file)!r}: is not a file name") from exc
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{file}: is not a regular file")
        content = bytearray()
        while len(content) <= most and (piece := os.read(descriptor, most + 1 - len(content))):
            content += piece
    finally:
        os.close(descriptor)
    if len(content) > most:
        raise ValueError(f"{file}: is larger than {most} bytes")
    return bytes(content)
