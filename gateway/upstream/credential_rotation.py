"""Credential rotation: selects the key pair of a call, and another one if the upstream refuses it.

    use -> the signing pair ──refused──> reload the files -> one trial at a time -> refused
                                                                       └─accepted─> this pair signs

A refusal applies to one pair and one operation: an account may be authorised for some operations only. After
a pause, a refused pair is used again, but only for a trial: one query uses the pair while all others wait for
the outcome. Three pairs are candidates:

    the active slot      it is read again after a refusal; new content signs at once, without a trial
    the next slot        for a rotation during which no query fails
    the last good pair   the last one that the upstream accepted, kept in memory; needed if the new content of
                         the files is wrong, or was read half old and half new

A trial is a real query of a caller, signed with the pair to be tested, within the deadline of the query. Any
valid envelope promotes the pair, even one that rejects the query. A refused pair pauses, so that it is not
tried with every query. It is tried again later, because the upstream may learn of a key later than the
gateway. Any other outcome (a timeout, a throttling response) says nothing about the pair, and the next query
tries it.

An exhausted quota or an overdue account pauses the pair, too, but no other pair is tried. The key is valid,
and an operator must act: the gateway must not use the quota of another account by itself. Refused timestamps
and nonces say nothing about the pair, and have no effect here.
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
    """The pair of one call (`loaded`), and the pair that signed when the call began (`signing`)."""

    loaded: LoadedKeyPair
    signing: LoadedKeyPair | None
    is_trial: bool


class CredentialRotation:
    """Selects the key pair of each call, depending on the outcomes of earlier calls.

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
        self._trial_lock = asyncio.Lock()
        self._refusals: dict[tuple[Operation, KeyPair], _Refusal] = {}
        self._last_good: LoadedKeyPair | None = None

    async def use(self, operation: Operation, call: Callable[[KeyPair], Awaitable[T]]) -> T:
        """Make a call with the signing pair. If it is refused, try the other candidates one after another.

        Raises:
            CredentialsRefused: Every candidate was refused or is paused, or there is none.
            Exception: What `call` raises.
        """
        tried: _Tried = {}
        while True:
            if (loaded := self._usable_signing_pair(operation, tried)) is not None:
                outcome = await self._call(operation, _Selection(loaded, loaded, is_trial=False), call)
            else:
                async with self._trial_lock:
                    if self._usable_signing_pair(operation, tried) is not None:
                        continue  # the trial of another query has found a usable pair
                    loaded = self._next_candidate(operation, tried)
                    trial = _Selection(loaded, self._credentials.signing_pair, is_trial=True)
                    outcome = await self._call(operation, trial, call)
            if not isinstance(outcome, CredentialsRefused):
                return outcome
            tried[loaded.pair] = outcome

    def describe_faults(self) -> list[str]:
        """Return a line about each refused slot if the pair that signs is in no slot any more, for operators.

        Queries then succeed, but only until the gateway restarts.
        """
        signing, loaded_pairs = self._credentials.signing_pair, self._credentials.loaded_pairs()
        if signing is None or any(loaded.pair == signing.pair for loaded in loaded_pairs):
            return []
        refused = {
            pair: refusal.error
            for (operation, pair), refusal in self._refusals.items()
            if (operation, signing.pair) not in self._refusals
        }
        return [
            f"credentials: {loaded.slot} key pair: {refused[loaded.pair]}; "
            "an earlier pair signs until the gateway restarts"
            for loaded in loaded_pairs
            if loaded.pair in refused
        ]

    async def wait_for_trial(self, operation: Operation) -> None:
        """Wait while another query tries a pair and the signing pair is refused.

        Call this before acquiring a permit and a concurrency slot: a waiting query must not hold them.
        """
        while self._trial_lock.locked() and self._usable_signing_pair(operation, {}) is None:
            async with self._trial_lock:
                pass

    async def _call(
        self, operation: Operation, selection: _Selection, call: Callable[[KeyPair], Awaitable[T]]
    ) -> T | CredentialsRefused:
        """Make a call. If its pair is refused and another one may be accepted, return the refusal."""
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
        """Return the pair that signs, or None while it is refused."""
        signing = self._credentials.signing_pair
        if signing is None or signing.pair in tried or (operation, signing.pair) in self._refusals:
            return None
        return signing

    def _next_candidate(self, operation: Operation, tried: _Tried) -> LoadedKeyPair:
        """Return the next candidate for a trial. Raises: CredentialsRefused, if there is none."""
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
            return  # the call was in flight at the first refusal
        self._refusals[operation, loaded.pair] = _Refusal(now + self._refusal_seconds, copy(error))
        if before is None:
            hint = "run `sd-gateway check`"
            log.warning(
                "credentials_refused",
                operation=operation,
                reason=str(error),
                **_log_fields(loaded),
                hint=hint,
            )
        self._credentials.reload()  # the files may have changed since the last poll
        known = {candidate.pair for candidate in self._candidates()}
        # The refusal of a replaced pair is kept until its pause is over: later refusals are then not logged.
        self._refusals = {
            key: refusal for key, refusal in self._refusals.items() if key[1] in known or now < refusal.until
        }

    def _on_accepted(self, operation: Operation, selection: _Selection) -> None:
        # Only a trial clears a refusal. Other accepted calls may have been sent before the refusal.
        loaded = selection.loaded
        if selection.is_trial:
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
