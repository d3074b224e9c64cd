"""Credential rotation: which key pair signs a call, and which one replaces it when the upstream refuses it.

    use -> the signing pair ──refused──> reload the files -> one probe at a time -> refused
                                                                       └─accepted─> this pair signs

A refusal applies to a pair and an operation, not to a task: an account may be authorised for one operation
only. A refused pair is used as a probe only: after a pause, and by one query at a time, while all others
wait for the outcome. Three pairs are candidates:

    the active slot      new content is read at once after a refusal, and signs without a probe
    the next slot        for rotation without a gap
    the last good pair   the last one that the upstream accepted, kept in memory: files that are written one
                         after the other may be read half and half, or may contain an error

A probe is a real query, signed again within its own deadline. Any valid envelope promotes the pair, even one
that rejects the query. A refusal excludes the pair for a while, so that it is not tried with every query. It
does not exclude the pair for good, because the upstream may learn of a key later than the gateway. Any other
outcome (a timeout, a throttling response) says nothing about the pair, and the next query probes it.

An exhausted quota or an overdue account pauses the pair, too, but no other pair is tried: the key is valid,
an operator must act, and the gateway must not move on to the quota of another account by itself. Refused
timestamps and nonces are transient and say nothing about the pair.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from copy import copy
from typing import Any, NamedTuple, TypeVar

import structlog

from gateway.domain.errors import (
    CredentialsRefused,
    KeyPairMissing,
    NonceRefused,
    QuotaExhausted,
    TimestampRefused,
    UpstreamRejected,
)
from gateway.domain.task import Operation
from gateway.upstream.credentials import Credentials, KeyPair, LoadedKeyPair

log = structlog.get_logger(__name__)

T = TypeVar("T")
_Tried = dict[KeyPair, CredentialsRefused]


class _Refusal(NamedTuple):
    until: float
    error: CredentialsRefused


class _Selection(NamedTuple):
    """The credentials of one call, and the signing ones at its start. At most one call at a time probes."""

    loaded: LoadedKeyPair
    signing: LoadedKeyPair | None
    is_probe: bool


class CredentialRotation:
    """Selects the key pair of each call, and learns from the outcome.

    `refusal_seconds`: how long a pair pauses after a refusal. `clock` returns monotonic seconds.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        refusal_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._credentials = credentials
        self._refusal_seconds = refusal_seconds
        self._clock = clock
        self._probe_lock = asyncio.Lock()
        self._refusals: dict[tuple[Operation, KeyPair], _Refusal] = {}
        self._last_good: LoadedKeyPair | None = None

    async def use(self, operation: Operation, call: Callable[[KeyPair], Awaitable[T]]) -> T:
        """Make a call with the signing pair. If it is refused, try the other candidates one after another.

        Raises:
            CredentialsRefused: Every candidate was refused. If all are paused, no call is made.
            Exception: What `call` raises.
        """
        tried: _Tried = {}
        while True:
            if (loaded := self._usable_signing_pair(operation, tried)) is not None:
                outcome = await self._call(operation, _Selection(loaded, loaded, is_probe=False), call)
            else:
                async with self._probe_lock:
                    if self._usable_signing_pair(operation, tried) is not None:
                        continue  # the probe of another query has found a usable pair
                    loaded = self._next_candidate(operation, tried)
                    probe = _Selection(loaded, self._credentials.signing_pair, is_probe=True)
                    outcome = await self._call(operation, probe, call)
            if not isinstance(outcome, CredentialsRefused):
                return outcome
            tried[loaded.pair] = outcome

    async def wait_for_probe(self, operation: Operation) -> None:
        """Wait while another query probes a pair.

        A waiting query has no permit, and does not count towards the concurrency limit.
        """
        while self._probe_lock.locked() and self._usable_signing_pair(operation, {}) is None:
            async with self._probe_lock:
                pass

    async def _call(
        self, operation: Operation, selection: _Selection, call: Callable[[KeyPair], Awaitable[T]]
    ) -> T | CredentialsRefused:
        """Make a call; return the refusal if another pair may be accepted."""
        try:
            result = await call(selection.loaded.pair)
        except (TimestampRefused, NonceRefused):
            raise
        except CredentialsRefused as exc:
            self._on_refused(operation, selection.loaded, exc)
            if isinstance(exc, QuotaExhausted):
                raise
            return copy(exc)
        except UpstreamRejected:
            self._on_accepted(operation, selection)
            raise
        self._on_accepted(operation, selection)
        return result

    def _usable_signing_pair(self, operation: Operation, tried: _Tried) -> LoadedKeyPair | None:
        """Return the signing credentials, or None while they are refused."""
        signing = self._credentials.signing_pair
        if signing is None or signing.pair in tried or (operation, signing.pair) in self._refusals:
            return None
        return signing

    def _next_candidate(self, operation: Operation, tried: _Tried) -> LoadedKeyPair:
        """Return the next candidate for a probe. Raises: CredentialsRefused, if there is none."""
        now = self._clock()
        errors = []
        for loaded in self._candidates():
            if loaded.pair in tried:
                errors.append(tried[loaded.pair])
                continue
            refusal = self._refusals.get((operation, loaded.pair))
            if refusal is None or refusal.until <= now:
                return loaded
            errors.append(refusal.error)
            if loaded is self._credentials.signing_pair and isinstance(refusal.error, QuotaExhausted):
                break
        if not errors:
            raise KeyPairMissing("the gateway has no credentials")
        raise copy(errors[0])  # a copy for this caller: many may share the error

    def _candidates(self) -> list[LoadedKeyPair]:
        known = (self._credentials.signing_pair, *self._credentials.loaded_pairs(), self._last_good)
        return [loaded for loaded in known if loaded is not None]

    def _on_refused(self, operation: Operation, loaded: LoadedKeyPair, error: CredentialsRefused) -> None:
        now = self._clock()
        before = self._refusals.get((operation, loaded.pair))
        if before is not None and now < before.until:
            return  # one of several calls that were in flight at the first refusal
        self._refusals[operation, loaded.pair] = _Refusal(now + self._refusal_seconds, copy(error))
        if before is None:
            log.warning("credentials_refused", operation=operation, reason=str(error), **_log_fields(loaded))
        self._credentials.reload()  # the files may have changed since the last poll
        known = {candidate.pair for candidate in self._candidates()}
        # Keep the refusal of a replaced pair until its pause is over: later refusals then write no second
        # log line.
        self._refusals = {
            key: refusal for key, refusal in self._refusals.items() if key[1] in known or now < refusal.until
        }

    def _on_accepted(self, operation: Operation, selection: _Selection) -> None:
        # Only a probe clears a refusal: a call that was in flight before the refusal proves nothing any more.
        loaded = selection.loaded
        if selection.is_probe:
            self._refusals.pop((operation, loaded.pair), None)
            self._promote(operation, selection)
        if loaded is self._credentials.signing_pair and (operation, loaded.pair) not in self._refusals:
            self._last_good = loaded

    def _promote(self, operation: Operation, selection: _Selection) -> None:
        loaded, signing = selection.loaded, selection.signing
        if signing is not None and signing.pair == loaded.pair:
            log.info("credentials_accepted_again", operation=operation, **_log_fields(loaded))
        elif (
            signing is self._credentials.signing_pair
        ):  # else the active slot has received new content meanwhile
            self._credentials.set_signing_pair(loaded)
            log.warning("credentials_promoted", operation=operation, **_log_fields(loaded))


def _log_fields(loaded: LoadedKeyPair) -> dict[str, Any]:
    return {"slot": loaded.slot, "generation": loaded.generation}
