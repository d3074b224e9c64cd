"""Reads files of secrets and of certificates: small regular files, and nothing that may hang.

Opening a FIFO waits for a writer, and a device may go on for ever. A mistake in a mount can put either
where a secret is expected.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

MOST_BYTES = 65_536
_MOST_CERTIFICATE_BYTES = 4 * 1024 * 1024  # a bundle of all public authorities has 300 KB


def read_secret(file: Path) -> str:
    """Return the file's text, without white space around it.

    Raises: OSError, and ValueError for what is no regular file, too large or not UTF-8; both name the file.
    """
    content = _read(file, most=MOST_BYTES)
    try:
        return content.decode().strip()
    except UnicodeDecodeError:
        raise ValueError(f"{file}: is not UTF-8") from None  # the codec's own words quote the content


def check_bundle(file: Path) -> None:
    """Make sure that a file of certificates can be read at once.

    Raises: OSError, ValueError; both name the file.
    """
    _read(file, most=_MOST_CERTIFICATE_BYTES)


def _read(file: Path, *, most: int) -> bytes:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError as exc:  # a NUL in the name
        raise ValueError(f"{str(file)!r}: is not a file's name") from exc
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
