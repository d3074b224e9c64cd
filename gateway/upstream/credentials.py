"""The access-key pairs, in two slots: from the settings, or from mounted files that may change.

    active   the pair that signs
    next     a second one, which signs after it was promoted (`rotation.py` decides that)

                      refused; the next pair is accepted
    active signs  ─────────────────────────────────────────>  next signs
                  <─────────────────────────────────────────
                      the active slot reads new content (it is newer, whatever it holds);
                      or: refused; the active pair is accepted again

New content in the next slot changes nothing by itself: a promoted pair goes on signing although
its file holds another by now. All is compared by content, so an operator who moves the promoted
pair into the active slot changes a name and nothing else.

Kubernetes swaps a mounted secret through a symlink, without telling anybody and between any
two reads. So the files are compared by content, by polling, and a pair counts only when two
readings of both files agree: then both are of one generation. Files that are written in place, one
after the other, may be read half and half all the same; upstream refuses such a pair, and what
happens then is `rotation.py`'s affair.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import structlog

from gateway.settings.model import Credentials as CredentialSettings
from gateway.settings.secret_files import read_secret
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor

POLL_SECONDS = 2.0
_READINGS = 5

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An access key and its secret; neither shows in a repr."""

    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)


class Slot(StrEnum):
    """Where a pair is set."""

    ACTIVE = "active"
    NEXT = "next"


class CredentialVersion(NamedTuple):
    """A pair and where it came from; `generation` counts the contents that its slot has had, from 1."""

    slot: Slot
    generation: int
    pair: KeyPair


class Credentials:
    """Holds the pairs, keeps them as new as their files, and knows which one signs."""

    def __init__(self, settings: CredentialSettings, *, redactor: Redactor, metrics: Metrics) -> None:
        self._redactor = redactor
        self._metrics = metrics
        self._sources = {
            Slot.ACTIVE: _Source(
                _Place(settings.access_key_file, settings.access_key.get_secret_value()),
                _Place(settings.secret_key_file, settings.secret_key.get_secret_value()),
            ),
            Slot.NEXT: _Source(
                _Place(settings.next_access_key_file, settings.next_access_key.get_secret_value()),
                _Place(settings.next_secret_key_file, settings.next_secret_key.get_secret_value()),
            ),
        }
        self._held: dict[Slot, CredentialVersion] = {}
        self._faults: dict[Slot, str] = {}
        self._signing: CredentialVersion | None = None
        for slot in Slot:
            metrics.credentials_active_slot.labels(slot).set(0)
        self.reload()

    @property
    def signing(self) -> CredentialVersion | None:
        """The pair that signs; None while there is none, or only a next one that nobody has tried yet."""
        return self._signing

    @property
    def present(self) -> bool:
        """Whether there is any pair to sign with."""
        return bool(self._held)

    def held(self) -> list[CredentialVersion]:
        """Return what the slots hold, the active one first."""
        return [self._held[slot] for slot in Slot if slot in self._held]

    def faults(self) -> Mapping[Slot, str]:
        """Return why slots could not be read at the last look; no secret is in it."""
        return self._faults

    def sign_with(self, held: CredentialVersion) -> None:
        """Let this pair sign from now on, until another does or the active slot has new content."""
        self._signing = held
        for slot in Slot:
            self._metrics.credentials_active_slot.labels(slot).set(slot is held.slot)

    def reload(self) -> None:
        """Read both slots again; a pair that cannot be read leaves the one in use in place."""
        for slot in Slot:
            self._reload(slot)

    async def follow(self) -> None:
        """Reload for ever; returns at once when no file is named."""
        while any(source.watches for source in self._sources.values()):
            await asyncio.sleep(POLL_SECONDS)
            self.reload()

    def _reload(self, slot: Slot) -> None:
        source, held = self._sources[slot], self._held.get(slot)
        try:
            pair = source.read()
        except (OSError, ValueError) as exc:
            # One line and one count per change of fault: a poll sees the same one every time.
            fault = f"{type(exc).__name__}: {exc}"
            if fault != self._faults.get(slot):
                self._faults[slot] = fault
                self._metrics.credentials_reloads.labels("error").inc()
                log.warning("credentials unreadable", slot=slot, fault=fault, in_use=held is not None)
            return
        self._faults.pop(slot, None)
        if pair is None or (held is not None and held.pair == pair):
            return
        self._redactor.hide_credentials(pair.access_key, pair.secret_key)
        new = CredentialVersion(slot, 1 if held is None else held.generation + 1, pair)
        self._held[slot] = new
        if source.watches:
            self._metrics.credentials_reloads.labels("ok").inc()
            log.info("credentials read", slot=slot, generation=new.generation)
        if slot is Slot.ACTIVE:
            self.sign_with(new)


class _Place(NamedTuple):
    """Where one half of a pair stands."""

    file: Path | None
    value: str

    def read(self) -> str:
        return self.value if self.file is None else read_secret(self.file)


class _Source(NamedTuple):
    """Where a slot's pair stands."""

    access_key: _Place
    secret_key: _Place

    @property
    def watches(self) -> bool:
        return self.access_key.file is not None or self.secret_key.file is not None

    def read(self) -> KeyPair | None:
        """Return a pair that can sign, or None where none is set. Raises: OSError, ValueError."""
        before = self._read_once()
        for _ in range(_READINGS):
            after = self._read_once()
            if after == before:
                break
            before = after
        else:
            raise ValueError("the files keep changing")
        if not after.access_key and not after.secret_key and not self.watches:
            return None
        if not after.access_key or not after.secret_key:
            raise ValueError("access key or secret key is empty")
        # It goes into a header: a byte order mark, say, would fail in every query instead of here.
        if not (after.access_key.isascii() and after.access_key.isprintable()):
            raise ValueError("access key has characters that no header can carry")
        return after

    def _read_once(self) -> KeyPair:
        return KeyPair(self.access_key.read(), self.secret_key.read())
