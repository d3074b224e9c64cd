"""The access-key pair in use: from the settings, or from mounted files that may change.

Kubernetes swaps a mounted secret through a symlink, without telling anybody and between any
two reads. So the files are compared by content, by polling, and a pair counts only when two
readings of both files agree: then both are of one generation.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from gateway.exceptions import UpstreamCredentials
from gateway.metrics import Metrics
from gateway.redaction import Redactor
from gateway.settings import Credentials as CredentialSettings

POLL_SECONDS = 2.0
_READINGS = 5

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pair:
    """An access key and its secret; neither shows in a repr."""

    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)


class Credentials:
    """Holds the pair to sign with, and keeps it as new as its files."""

    def __init__(self, settings: CredentialSettings, *, redactor: Redactor, metrics: Metrics) -> None:
        self._settings = settings
        self._redactor = redactor
        self._metrics = metrics
        self._pair: Pair | None = None
        self._fault = ""
        self._watches = settings.access_key_file is not None or settings.secret_key_file is not None
        self.reload()

    @property
    def pair(self) -> Pair:
        """The pair to sign with. Raises: UpstreamCredentials while there is none."""
        if self._pair is None:
            raise UpstreamCredentials("the gateway has no credentials")
        return self._pair

    @property
    def present(self) -> bool:
        """Whether there is a pair to sign with."""
        return self._pair is not None

    def reload(self) -> None:
        """Read the pair again; a pair that cannot be read leaves the one in use in place."""
        try:
            pair = self._read()
        except (OSError, ValueError) as exc:
            # One line and one count per change of fault: a poll sees the same one every time.
            fault = f"{type(exc).__name__}: {exc}"
            if fault != self._fault:
                self._fault = fault
                self._metrics.credentials_reloads.labels("error").inc()
                log.warning("credentials unreadable", fault=fault, in_use=self.present)
            return
        self._fault = ""
        if pair == self._pair:
            return
        if pair is not None:
            self._redactor.hide(pair.access_key, pair.secret_key)
        if self._watches:
            self._metrics.credentials_reloads.labels("ok").inc()
            log.info("credentials read")
        self._pair = pair

    async def follow(self) -> None:
        """Reload for ever; returns at once when no file is named."""
        while self._watches:
            await asyncio.sleep(POLL_SECONDS)
            self.reload()

    def _read(self) -> Pair | None:
        before = self._read_once()
        for _ in range(_READINGS):
            after = self._read_once()
            if after == before:
                break
            before = after
        else:
            raise ValueError("the files keep changing")
        if not after.access_key and not after.secret_key and not self._watches:
            return None
        if not after.access_key or not after.secret_key:
            raise ValueError("access key or secret key is empty")
        # It goes into a header: a byte order mark, say, would fail in every query instead of here.
        if not (after.access_key.isascii() and after.access_key.isprintable()):
            raise ValueError("access key has characters that no header can carry")
        return after

    def _read_once(self) -> Pair:
        settings = self._settings
        return Pair(
            _value(settings.access_key_file, settings.access_key.get_secret_value()),
            _value(settings.secret_key_file, settings.secret_key.get_secret_value()),
        )


def _value(file: Path | None, value: str) -> str:
    return file.read_text(encoding="utf-8").strip() if file is not None else value
