"""The key pairs in two slots. They come from the settings, or from mounted files that may change.

    active   the pair that signs
    next     a second pair, which signs after `credential_rotation.py` has promoted it

                      refused, and the next pair is accepted
    active signs  ─────────────────────────────────────────>  next signs
                  <─────────────────────────────────────────
                      the active slot reads new content, whatever it is;
                      or: refused, and the active pair is accepted again

New content in the next slot has no effect by itself: a promoted pair keeps signing, even if its file has new
content meanwhile. Pairs are compared by content. If an operator moves the promoted pair into the active slot,
only the slot's name in logs and metrics changes.

Kubernetes replaces a mounted secret through a symlink, without notice, possibly between the reads of two
files. So the files are polled and compared by content. A pair is used only if two consecutive reads of both
files agree: then both files belong to one generation. If files are written in place, one after the other, a
read may still combine the old content of one with the new content of the other. The upstream refuses such a
pair, and `credential_rotation.py` handles this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import structlog
from pydantic import SecretStr

from gateway.settings.model import Credentials as CredentialSettings
from gateway.settings.secret_files import describe_read_error, read_secret
from gateway.settings.secret_text import SecretText, setting_text
from gateway.settings.value_text import toml_value
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor

POLL_SECONDS = 2.0
_MAX_READS = 5

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An access key and its secret key; neither appears in the repr."""

    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)


class CredentialSlot(StrEnum):
    """Where a pair is configured."""

    ACTIVE = "active"
    NEXT = "next"


class LoadedKeyPair(NamedTuple):
    """A pair and its origin.

    `generation` is the number of contents that the slot has had so far. `description` has a line about each
    key, for an operator; it does not show the keys.
    """

    slot: CredentialSlot
    generation: int
    pair: KeyPair
    description: tuple[str, ...] = ()


class Credentials:
    """Holds the pairs of both slots and the pair that signs, and polls their files."""

    def __init__(self, settings: CredentialSettings, *, redactor: Redactor, metrics: Metrics) -> None:
        self._redactor = redactor
        self._metrics = metrics
        self._sources = {
            CredentialSlot.ACTIVE: _PairSource(
                _KeySource("access_key", settings.access_key_file, settings.access_key),
                _KeySource("secret_key", settings.secret_key_file, settings.secret_key),
            ),
            CredentialSlot.NEXT: _PairSource(
                _KeySource("next_access_key", settings.next_access_key_file, settings.next_access_key),
                _KeySource("next_secret_key", settings.next_secret_key_file, settings.next_secret_key),
            ),
        }
        self._loaded: dict[CredentialSlot, LoadedKeyPair] = {}
        self._read_errors: dict[CredentialSlot, str] = {}
        self._signing: LoadedKeyPair | None = None
        for slot in CredentialSlot:
            metrics.credentials_active_slot.labels(slot).set(0)
        self.reload()

    @property
    def signing_pair(self) -> LoadedKeyPair | None:
        """The pair that signs. None if there is no pair, or only a next pair that was not tried yet."""
        return self._signing

    @property
    def has_any_pair(self) -> bool:
        """Whether any slot has a pair."""
        return bool(self._loaded)

    def loaded_pairs(self) -> list[LoadedKeyPair]:
        """Return the pairs of the slots, the active one first."""
        return [self._loaded[slot] for slot in CredentialSlot if slot in self._loaded]

    def read_errors(self) -> Mapping[CredentialSlot, str]:
        """Return the errors of slots that could not be read at the last attempt, without secrets."""
        return self._read_errors

    def describe_faults(self) -> list[str]:
        """Return a line about each slot that could not be read at the last attempt, for operators."""
        faults = self._read_errors.items()
        return [f"credentials: {slot} key pair: {self._redactor(fault)}" for slot, fault in faults]

    def set_signing_pair(self, loaded: LoadedKeyPair) -> None:
        """Make this pair sign, until another pair is promoted or the active slot has new content."""
        self._signing = loaded
        for slot in CredentialSlot:
            self._metrics.credentials_active_slot.labels(slot).set(slot is loaded.slot)

    def reload(self) -> None:
        """Read both slots again. If a pair cannot be read, the previous one stays in use."""
        for slot in CredentialSlot:
            self._reload(slot)

    async def poll_files(self) -> None:
        """Reload every `POLL_SECONDS`, without end; return at once if no slot is read from files."""
        while any(source.has_files for source in self._sources.values()):
            await asyncio.sleep(POLL_SECONDS)
            self.reload()

    def _reload(self, slot: CredentialSlot) -> None:
        source, previous = self._sources[slot], self._loaded.get(slot)
        try:
            keys = source.read(was_read=previous is not None)
        except UnusableKey as exc:
            # Log and count only changes, because each poll would find the same fault.
            fault = str(exc)
            if fault != self._read_errors.get(slot):
                self._read_errors[slot] = fault
                self._metrics.credentials_reloads.labels("error").inc()
                log.warning("credentials_unreadable", slot=slot, fault=fault, in_use=previous is not None)
            return
        had_fault = self._read_errors.pop(slot, None) is not None
        if keys is None:
            return
        pair = KeyPair(keys.access_key.text, keys.secret_key.text)
        if previous is not None and previous.pair == pair:
            if had_fault:
                log.info("credentials_readable", slot=slot)
            return
        self._redactor.add_credentials(pair.access_key, pair.secret_key)
        generation = 1 if previous is None else previous.generation + 1
        loaded = LoadedKeyPair(slot, generation, pair, keys.describe())
        self._loaded[slot] = loaded
        if source.has_files:
            self._metrics.credentials_reloads.labels("ok").inc()
            log.info("credentials_loaded", slot=slot, generation=loaded.generation)
        if keys.access_key.quoted or keys.secret_key.quoted:
            log.warning("credentials_in_quotes", slot=slot, effect="the quotes are part of the key")
        if slot is CredentialSlot.ACTIVE:
            self.set_signing_pair(loaded)


class _Keys(NamedTuple):
    """What was read of a pair."""

    access_key: SecretText
    secret_key: SecretText

    def describe(self) -> tuple[str, str]:
        return self.access_key.describe("access key"), self.secret_key.describe("secret key")


class UnusableKey(Exception):
    """A key cannot be read or used. The text names the setting and the file, and does not show the key."""


class _KeySource(NamedTuple):
    """The source of one half of a pair: a file, or else the value of the setting."""

    setting: str
    file: Path | None
    value: SecretStr

    @property
    def name(self) -> str:
        """The setting that names the source."""
        return f"credentials.{self.setting}" + ("" if self.file is None else "_file")

    def read(self, *, was_read: bool) -> SecretText:
        """Return the key. `was_read`: the slot could be read before. Raises: UnusableKey."""
        if self.file is None:
            return setting_text(self.value)
        try:
            return read_secret(self.file)
        except PermissionError as exc:
            raise self.fault(describe_read_error(exc)) from None
        except OSError as exc:
            if not was_read and not self.file.is_absolute():
                # A common mistake is the key itself as the file name. `/readyz` shows this text to everyone.
                problem = "no such file in the working directory; is the value the key itself?"
                raise UnusableKey(f"{self.name}: {problem}") from None
            raise self.fault(f"{describe_read_error(exc)}; {self._expected}") from None
        except ValueError as exc:
            raise self.fault(f"{str(exc).rpartition(': ')[2]}; {self._expected}") from None

    def check(self, key: SecretText) -> None:
        """Check that the key can be used. Raises: UnusableKey."""
        if not key.text and self.file is None:
            raise self.fault(f"is empty; set it, or set {self.name}_file")
        if not key.text:
            raise self.fault(f"is empty; {self._expected}")
        # The access key becomes a header value.
        if self.setting.endswith("access_key") and not (key.text.isascii() and key.text.isprintable()):
            problem = "has characters that are not allowed in an HTTP header; expected printable ASCII"
            raise self.fault(problem)

    def fault(self, problem: str) -> UnusableKey:
        """Return the error for a problem with this source."""
        shown = self.name if self.file is None else f"{self.name} = {toml_value(self.file)}"
        return UnusableKey(f"{shown}: {problem}")

    @property
    def _expected(self) -> str:
        return f"expected a file with the {self.setting.replace('_', ' ')} alone, on one line"


class _PairSource(NamedTuple):
    """The source of a slot's pair."""

    access_key: _KeySource
    secret_key: _KeySource

    @property
    def has_files(self) -> bool:
        return self.access_key.file is not None or self.secret_key.file is not None

    def read(self, *, was_read: bool) -> _Keys | None:
        """Return a pair that can sign, or None if none is configured. Raises: UnusableKey."""
        before = self._read_once(was_read=was_read)
        for _ in range(_MAX_READS):
            after = self._read_once(was_read=was_read)
            if after == before:
                break
            before = after
        else:
            names = f"{self.access_key.name} and {self.secret_key.name}"
            raise UnusableKey(f"{names}: the files keep changing; expected files that are written once")
        if not after.access_key.text and not after.secret_key.text and not self.has_files:
            return None
        for source, key in zip(self, after, strict=True):
            source.check(key)
        return after

    def _read_once(self, *, was_read: bool) -> _Keys:
        return _Keys(self.access_key.read(was_read=was_read), self.secret_key.read(was_read=was_read))
