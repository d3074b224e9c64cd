"""Which pair signs a call, and which one does when upstream refuses it.

    use -> the pair that signs ──refused──> read the files again -> one trial at a time -> refused
                                                                          └─accepted─> it signs

A refusal belongs to a pair and an operation, not to a task: an account may be authorised for one
operation and not for another. A pair that was refused is used on trial only: by one query at a time,
while all others wait for the outcome, and after a rest. Three pairs can be tried:

    the active slot's     new content is read at once on a refusal, and used without trial
    the next slot's       rotation without a gap
    the last one that upstream accepted, still in memory: files that were written one after the
                          other may be read half and half, or hold a slip of the pen

A trial is a real query, signed again inside its own deadline. An envelope, whatever its status,
promotes the pair. A refusal keeps it out for a while, so that it is not asked with every query; not
for ever, for upstream may learn of a key later than we do. Anything else (a time-out, a
throttle) says nothing about the pair: the next query tries it.

Spent quotas and open bills rest the pair too, but nobody else's pair is tried: the key is known and
right, a person must act, and moving on to another account's quota is not for a gateway to
decide. Refused clocks and nonces pass, and are no verdict on the pair.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from copy import copy
from typing import Any, NamedTuple, TypeVar

import structlog

from gateway.domain.errors import (
    UpstreamClock,
    UpstreamCredentials,
    UpstreamNonce,
    UpstreamQuota,
    UpstreamRejected,
)
from gateway.domain.task import Operation
from gateway.upstream.credentials import Credentials, CredentialVersion, KeyPair

KEPT_OUT_SECONDS = 30.0  # a pair that was refused on trial

log = structlog.get_logger(__name__)

T = TypeVar("T")
_Tried = dict[KeyPair, UpstreamCredentials]


class _Refusal(NamedTuple):
    until: float
    error: UpstreamCredentials


class _Use(NamedTuple):
    """A pair for one call, and the one that signs for everybody. One turn at a time is on trial."""

    held: CredentialVersion
    signing: CredentialVersion | None
    on_trial: bool


class CredentialRotation:
    """Gives calls their pair, and learns from what becomes of them.

    `refusal_seconds`: how long the pair that signs rests after a refusal. `clock`: monotonic seconds.
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
        self._trial = asyncio.Lock()
        self._refused: dict[tuple[Operation, KeyPair], _Refusal] = {}
        self._proven: CredentialVersion | None = None

    async def use(self, operation: Operation, call: Callable[[KeyPair], Awaitable[T]]) -> T:
        """Make a call with the pair that signs, and once again with each other one if it is refused.

        Raises: what `call` raises; UpstreamCredentials, without a call, while every pair rests.
        """
        tried: _Tried = {}
        while True:
            if (held := self._trusted(operation, tried)) is not None:
                outcome = await self._make(operation, _Use(held, held, on_trial=False), call)
            else:
                async with self._trial:
                    if self._trusted(operation, tried) is not None:
                        continue  # the trial that we waited for has brought one
                    held = self._suspect(operation, tried)
                    trial = _Use(held, self._credentials.signing, on_trial=True)
                    outcome = await self._make(operation, trial, call)
            if not isinstance(outcome, UpstreamCredentials):
                return outcome
            tried[held.pair] = outcome

    async def settled(self, operation: Operation) -> None:
        """Wait while another query tries a pair: a query that waits here holds neither a turn nor a slot."""
        while self._trial.locked() and self._trusted(operation, {}) is None:
            async with self._trial:
                pass

    async def _make(
        self, operation: Operation, turn: _Use, call: Callable[[KeyPair], Awaitable[T]]
    ) -> T | UpstreamCredentials:
        """Make a call, and return the refusal if another pair may do better."""
        try:
            answer = await call(turn.held.pair)
        except (UpstreamClock, UpstreamNonce):
            raise
        except UpstreamCredentials as exc:
            self._refuse(operation, turn.held, exc)
            if isinstance(exc, UpstreamQuota):
                raise
            return copy(exc)
        except UpstreamRejected:
            self._accept(operation, turn)
            raise
        self._accept(operation, turn)
        return answer

    def _trusted(self, operation: Operation, tried: _Tried) -> CredentialVersion | None:
        signing = self._credentials.signing
        if signing is None or signing.pair in tried or (operation, signing.pair) in self._refused:
            return None
        return signing

    def _suspect(self, operation: Operation, tried: _Tried) -> CredentialVersion:
        now = self._clock()
        errors = []
        for held in self._candidates():
            if held.pair in tried:
                errors.append(tried[held.pair])
                continue
            refusal = self._refused.get((operation, held.pair))
            if refusal is None or refusal.until <= now:
                return held
            errors.append(refusal.error)
            if held is self._credentials.signing and isinstance(refusal.error, UpstreamQuota):
                break
        if not errors:
            raise UpstreamCredentials("the gateway has no credentials")
        raise copy(errors[0])  # for this caller alone: many may share it

    def _candidates(self) -> list[CredentialVersion]:
        known = (self._credentials.signing, *self._credentials.held(), self._proven)
        return [held for held in known if held is not None]

    def _refuse(self, operation: Operation, held: CredentialVersion, error: UpstreamCredentials) -> None:
        now = self._clock()
        before = self._refused.get((operation, held.pair))
        if before is not None and now < before.until:
            return  # one of many calls that were in the air when the first was refused
        signing = self._credentials.signing
        signs = signing is not None and signing.pair == held.pair
        seconds = self._refusal_seconds if signs else KEPT_OUT_SECONDS
        self._refused[operation, held.pair] = _Refusal(now + seconds, copy(error))
        if before is None:
            log.warning("credentials refused", operation=operation, reason=str(error), **_shown(held))
        self._credentials.reload()  # the files may be newer than our last look
        kept = {candidate.pair for candidate in self._candidates()}
        self._refused = {key: refusal for key, refusal in self._refused.items() if key[1] in kept}

    def _accept(self, operation: Operation, turn: _Use) -> None:
        # Only a trial clears a refusal: a call that was in the air before it proves nothing any more.
        held = turn.held
        if turn.on_trial:
            self._refused.pop((operation, held.pair), None)
            self._promote(operation, turn)
        if held is self._credentials.signing and (operation, held.pair) not in self._refused:
            self._proven = held

    def _promote(self, operation: Operation, turn: _Use) -> None:
        held, signing = turn.held, turn.signing
        if signing is not None and signing.pair == held.pair:
            log.info("credentials accepted again", operation=operation, **_shown(held))
        elif signing is self._credentials.signing:  # else the active slot got newer content meanwhile
            self._credentials.sign_with(held)
            log.warning("credentials promoted", operation=operation, **_shown(held))


def _shown(held: CredentialVersion) -> dict[str, Any]:
    return {"slot": held.slot, "generation": held.generation}
