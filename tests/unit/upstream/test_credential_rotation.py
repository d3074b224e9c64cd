"""Credential rotation: refusals, probes, promotions, and waiting queries."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from gateway.domain.errors import (
    CredentialsRefused,
    KeyPairMissing,
    KeyPairRefused,
    NonceRefused,
    QuotaExhausted,
    TimestampRefused,
    UpstreamDetail,
    UpstreamError,
    UpstreamRejected,
    UpstreamTimeout,
)
from gateway.domain.task import Operation
from gateway.settings.model import Credentials as CredentialSettings
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor
from gateway.upstream.credential_rotation import CredentialRotation
from gateway.upstream.credentials import Credentials, CredentialSlot, KeyPair

REFUSAL_SECONDS = 1.0
REJECTED = UpstreamRejected("rejected", envelope=b"{}", detail=UpstreamDetail())


class Bench:
    """A rotation over two mounted slots, and an upstream that knows some keys, on a manual clock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 0.0
        self.known: set[str] = set()
        self.calls: list[str] = []
        self.metrics = Metrics(CollectorRegistry(), gateway_version="0")

    def mount(self, **pairs: str) -> None:
        """Write a slot's files; its pair is named by its key."""
        for slot, key in pairs.items():
            (self.folder / f"{slot}_key").write_text(key)
            (self.folder / f"{slot}_secret").write_text(f"secret of {key}")

    def begin(self) -> None:
        """Read the slots; one without files has no pair."""
        files = {
            f"{prefix}{half}_key_file": self.folder / f"{slot}_{name}"
            for slot, prefix in (("active", ""), ("next", "next_"))
            for half, name in (("access", "key"), ("secret", "secret"))
            if (self.folder / f"{slot}_key").exists()
        }
        settings = CredentialSettings.model_validate(files)
        self.credentials = Credentials(settings, redactor=Redactor(), metrics=self.metrics)
        self.rotation = CredentialRotation(
            self.credentials, refusal_seconds=REFUSAL_SECONDS, clock=lambda: self.now
        )

    async def answer(self, pair: KeyPair) -> str:
        """Act as the upstream: accept known keys, refuse others."""
        self.calls.append(pair.access_key)
        if pair.access_key not in self.known or pair.secret_key != f"secret of {pair.access_key}":
            raise KeyPairRefused(f"refused {pair.access_key}")
        return pair.access_key

    async def ask(self, operation: Operation = Operation.SD_GET_PROGRESS) -> str:
        """Make one call; return the key that was accepted."""
        return await self.rotation.use(operation, self.answer)

    async def refused(self) -> list[str]:
        """Make one call that must be refused; return the keys that were tried."""
        before = len(self.calls)
        with pytest.raises(CredentialsRefused):
            await self.ask()
        return self.calls[before:]

    def signing(self) -> tuple[str, int] | None:
        """Return slot and generation of the signing pair, and check the metric."""
        loaded = self.credentials.signing_pair
        shown = {
            slot: self.metrics.registry.get_sample_value("sd_gateway_credentials_active_slot", {"slot": slot})
            for slot in CredentialSlot
        }
        assert shown == {slot: float(loaded is not None and loaded.slot is slot) for slot in CredentialSlot}
        return None if loaded is None else (loaded.slot, loaded.generation)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Return a bench whose active slot holds `one` and whose next slot holds `two`."""
    bench = Bench(tmp_path)
    bench.mount(active="one", next="two")
    bench.known = {"one"}
    bench.begin()
    return bench


async def test_rotation_signs_with_the_active_pair(bench: Bench) -> None:
    """While the upstream accepts the active pair, the next one is not tried."""
    bench.known = {"one", "two"}
    assert [await bench.ask() for _ in range(3)] == ["one"] * 3
    assert bench.calls == ["one"] * 3
    assert bench.signing() == ("active", 1)


async def test_rotation_promotes_the_next_pair(bench: Bench) -> None:
    """A query with a refused active pair is signed with the next one, and so are all later queries."""
    await bench.ask()
    bench.known = {"two"}
    with capture_logs() as lines:
        assert [await bench.ask() for _ in range(3)] == ["two"] * 3
    assert bench.calls == ["one", "one", "two", "two", "two"]
    assert bench.signing() == ("next", 1)
    logged = [(line["event"], line["slot"], line["generation"]) for line in lines]
    assert logged == [("credentials_refused", "active", 1), ("credentials_promoted", "next", 1)]
    assert not [line for line in lines if "secret of" in str(line)]


async def test_rotation_accepts_any_envelope(bench: Bench) -> None:
    """An envelope with a rejection proves the pair as well as a successful one."""

    async def reject(pair: KeyPair) -> str:
        await bench.answer(pair)
        raise REJECTED

    bench.known = {"two"}
    with pytest.raises(UpstreamRejected):
        await bench.rotation.use(Operation.SD_GET_PROGRESS, reject)
    assert bench.calls == ["one", "two"]
    assert bench.signing() == ("next", 1)


async def test_rotation_makes_one_probe_for_many_queries(bench: Bench) -> None:
    """One of many refused queries probes the next pair; the others, and later ones, wait."""
    bench.known = {"two"}
    refuse, accept, on_trial = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slowly(pair: KeyPair) -> str:
        if pair.access_key == "one":
            await refuse.wait()
        elif not accept.is_set():
            on_trial.set()
            await accept.wait()
        return await bench.answer(pair)

    async with asyncio.TaskGroup() as group:
        queries = [
            group.create_task(bench.rotation.use(Operation.SD_GET_PROGRESS, slowly)) for _ in range(20)
        ]
        await asyncio.sleep(0)
        refuse.set()
        await on_trial.wait()
        queries += [
            group.create_task(bench.rotation.use(Operation.SD_GET_PROGRESS, slowly)) for _ in range(20)
        ]
        await asyncio.sleep(0)
        assert (bench.calls.count("one"), bench.calls.count("two")) == (20, 0)
        accept.set()
    assert [query.result() for query in queries] == ["two"] * 40
    assert (bench.calls.count("one"), bench.calls.count("two")) == (20, 40)


async def test_rotation_probes_a_refused_next_pair_once_for_many(bench: Bench) -> None:
    """A refused next pair is not tried by each waiting query: all receive the first refusal."""
    bench.known = set()
    refuse = asyncio.Event()

    async def slowly(pair: KeyPair) -> str:
        await refuse.wait()
        return await bench.answer(pair)

    queries = [asyncio.create_task(bench.rotation.use(Operation.SD_GET_PROGRESS, slowly)) for _ in range(20)]
    await asyncio.sleep(0)
    refuse.set()
    outcomes = await asyncio.gather(*queries, return_exceptions=True)
    assert {str(outcome) for outcome in outcomes} == {"refused one"}
    assert (bench.calls.count("one"), bench.calls.count("two")) == (20, 1)
    assert bench.signing() == ("active", 1)


async def test_rotation_pauses_refused_pairs(bench: Bench) -> None:
    """A refused pair pauses, and is then probed again; the first one that the upstream accepts signs."""
    bench.known = set()
    assert await bench.refused() == ["one", "two"]
    assert await bench.refused() == []
    bench.now += REFUSAL_SECONDS
    assert await bench.refused() == ["one", "two"]
    bench.now += REFUSAL_SECONDS
    bench.known = {"two"}
    assert await bench.ask() == "two"


async def test_rotation_probes_a_paused_pair_with_one_query(bench: Bench) -> None:
    """After the pause one query probes the pair; if the upstream accepts it, it signs for all queries."""
    bench.known = set()
    await bench.refused()
    bench.now += REFUSAL_SECONDS
    bench.calls.clear()
    outcomes = await asyncio.gather(*(bench.ask() for _ in range(10)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {KeyPairRefused}
    assert bench.calls == ["one", "two"]
    bench.known = {"one"}
    bench.now += REFUSAL_SECONDS
    with capture_logs() as lines:
        assert await asyncio.gather(*(bench.ask() for _ in range(10))) == ["one"] * 10
    assert [line["event"] for line in lines] == ["credentials_accepted_again"]
    assert bench.signing() == ("active", 1)


async def test_rotation_tries_new_content_of_the_next_slot_at_once(bench: Bench) -> None:
    """The pause belongs to a pair, not to its slot: new content is probed by the next query."""
    bench.known = {"three"}
    await bench.refused()
    bench.mount(next="three")
    bench.credentials.reload()
    assert await bench.ask() == "three"
    assert bench.signing() == ("next", 2)


async def test_rotation_reads_the_files_again_on_a_refusal(bench: Bench) -> None:
    """A refused pair whose files have changed is replaced within the query, before the next poll."""
    await bench.ask()
    bench.mount(active="three")
    bench.known = {"three"}
    assert await bench.ask() == "three"
    assert bench.calls == ["one", "one", "three"]
    assert bench.signing() == ("active", 2)


async def test_rotation_survives_a_pair_read_half_and_half(bench: Bench) -> None:
    """If files are read half and half, the upstream refuses the mixture and the last good pair signs."""
    await bench.ask()
    bench.known = {"one", "three"}
    (bench.folder / "active_key").write_text("three")
    bench.credentials.reload()
    assert bench.signing() == ("active", 2)
    assert [await bench.ask() for _ in range(2)] == ["one"] * 2
    assert bench.calls == ["one", "three", "two", "one", "one"]
    assert bench.signing() == ("active", 1)
    (bench.folder / "active_secret").write_text("secret of three")
    bench.credentials.reload()
    assert await bench.ask() == "three"
    assert bench.signing() == ("active", 3)


async def test_rotation_forgets_the_former_pair_once_the_new_one_is_accepted(bench: Bench) -> None:
    """A replaced pair is not tried any more after its successor was accepted once."""
    await bench.ask()
    bench.mount(active="three")
    bench.known = {"one", "three"}
    bench.credentials.reload()
    assert await bench.ask() == "three"
    bench.known = {"one"}
    assert await bench.refused() == ["three", "two"]


async def test_rotation_keeps_the_promoted_pair_when_it_moves_to_the_active_slot(bench: Bench) -> None:
    """Moving the promoted pair to the active slot changes the name of the slot, and causes no probe."""
    bench.known = {"two"}
    await bench.ask()
    bench.mount(active="two", next="three")
    bench.credentials.reload()
    bench.calls.clear()
    assert [await bench.ask() for _ in range(2)] == ["two"] * 2
    assert bench.calls == ["two"] * 2
    assert bench.signing() == ("active", 2)


async def test_rotation_prefers_new_content_of_the_active_slot(bench: Bench) -> None:
    """New content in the active slot signs after a promotion; if it is refused, the promoted pair signs."""
    bench.known = {"two", "three"}
    await bench.ask()
    bench.mount(active="three")
    bench.credentials.reload()
    assert await bench.ask() == "three"
    assert bench.signing() == ("active", 2)
    bench.mount(active="four")
    bench.credentials.reload()
    assert await bench.ask() == "two"
    assert bench.signing() == ("next", 1)


async def test_rotation_keeps_a_promoted_pair_that_left_its_slot(bench: Bench) -> None:
    """A promoted pair signs although its slot has new content, which is probed when the pair is refused."""
    bench.known = {"two"}
    await bench.ask()
    bench.mount(next="three")
    bench.credentials.reload()
    assert await bench.ask() == "two"
    assert bench.signing() == ("next", 1)
    bench.known = {"three"}
    bench.now += REFUSAL_SECONDS
    assert await bench.ask() == "three"
    assert bench.signing() == ("next", 2)


async def test_rotation_reports_slots_that_would_fail_after_a_restart(bench: Bench) -> None:
    """A refused pair is a fault while the pair that signs is in no slot, and no longer."""
    assert await bench.ask() == "one"
    bench.mount(active="wrong", next="also wrong")
    bench.credentials.reload()
    assert bench.rotation.describe_faults() == [], "not tried yet"
    assert await bench.ask() == "one"
    assert bench.rotation.describe_faults() == [
        f"credentials: {slot} key pair: refused {key}; an earlier pair signs until the gateway restarts"
        for slot, key in (("active", "wrong"), ("next", "also wrong"))
    ]
    known, bench.known = bench.known, set()
    await bench.refused()
    assert bench.rotation.describe_faults() == [], "the earlier pair does not work either"
    bench.known, bench.now = known, bench.now + REFUSAL_SECONDS
    assert await bench.ask() == "one"
    assert len(bench.rotation.describe_faults()) == 2
    bench.mount(next="one")
    bench.credentials.reload()
    assert bench.rotation.describe_faults() == [], "after a restart, the next pair would sign"
    bench.mount(next="two")
    bench.credentials.reload()
    assert len(bench.rotation.describe_faults()) == 1, "the next pair was not tried yet"
    bench.mount(active="three")
    bench.known = {"three"}
    bench.credentials.reload()
    assert await bench.ask() == "three"
    assert bench.rotation.describe_faults() == []


async def test_rotation_goes_back_when_the_promoted_pair_is_refused(bench: Bench) -> None:
    """When the promoted pair is refused later, the active pair is probed after its pause."""
    bench.known = {"two"}
    await bench.ask()
    bench.known = {"one"}
    assert await bench.refused() == ["two"]
    bench.now += REFUSAL_SECONDS
    assert await bench.ask() == "one"
    assert bench.signing() == ("active", 1)


async def test_rotation_keeps_content_that_was_read_during_a_probe(bench: Bench) -> None:
    """New content of the active slot that is read during a probe signs: it is newer."""
    bench.known = {"two", "three"}

    async def meanwhile(pair: KeyPair) -> str:
        if pair.access_key == "two":
            bench.mount(active="three")
            bench.credentials.reload()
        return await bench.answer(pair)

    assert await bench.rotation.use(Operation.SD_GET_PROGRESS, meanwhile) == "two"
    assert bench.signing() == ("active", 2)
    assert await bench.ask() == "three"


async def test_rotation_ignores_calls_sent_before_the_refusal(bench: Bench) -> None:
    """A success of a call that was sent before the refusal does not restore the refused pair."""
    late = asyncio.Event()

    async def early(pair: KeyPair) -> str:
        await late.wait()
        return pair.access_key

    query = asyncio.create_task(bench.rotation.use(Operation.SD_GET_PROGRESS, early))
    await asyncio.sleep(0)
    bench.known = set()
    assert await bench.refused() == ["one", "two"]
    late.set()
    assert await query == "one"
    assert await bench.refused() == []


@pytest.mark.parametrize("passing", [TimestampRefused, NonceRefused, UpstreamTimeout])
async def test_rotation_ignores_unrelated_errors(bench: Bench, passing: type[UpstreamError]) -> None:
    """After a clock error, a nonce error or a timeout the pair does not pause, and no other is tried."""

    async def fail(pair: KeyPair) -> str:
        await bench.answer(pair)
        raise passing("passes")

    bench.known = {"one", "two"}
    for _ in range(2):
        with pytest.raises(passing):
            await bench.rotation.use(Operation.SD_GET_PROGRESS, fail)
    assert bench.calls == ["one"] * 2


async def test_rotation_repeats_a_probe_without_outcome(bench: Bench) -> None:
    """A probe that times out fails its own query only; the next query makes its own probe."""
    bench.known = {"two"}

    async def late(pair: KeyPair) -> str:
        if pair.access_key == "two":
            raise UpstreamTimeout("late")
        return await bench.answer(pair)

    with pytest.raises(UpstreamTimeout):
        await bench.rotation.use(Operation.SD_GET_PROGRESS, late)
    assert bench.signing() == ("active", 1)
    assert await bench.ask() == "two"


async def test_rotation_passes_on_a_cancelled_probe(bench: Bench) -> None:
    """When the query of a probe is cancelled, a waiting query makes the probe."""
    bench.known = {"two"}
    on_trial = asyncio.Event()

    async def never(pair: KeyPair) -> str:
        if pair.access_key == "two":
            on_trial.set()
            await asyncio.Event().wait()
        return await bench.answer(pair)

    first = asyncio.create_task(bench.rotation.use(Operation.SD_GET_PROGRESS, never))
    await on_trial.wait()
    second = asyncio.create_task(bench.ask())
    await asyncio.sleep(0)
    first.cancel()
    assert await second == "two"


async def test_rotation_holds_refusals_against_their_operation_only(bench: Bench) -> None:
    """A pair that is refused for one operation keeps signing the others, and they do not wait."""
    bench.known = set()
    assert await bench.refused() == ["one", "two"]
    bench.known = {"one"}
    assert await bench.ask(Operation.COMFY_GET_PROGRESS) == "one"
    assert await bench.refused() == []


async def test_rotation_does_not_change_pairs_for_quotas(bench: Bench) -> None:
    """An exhausted quota pauses the pair, and does not move the load to the next pair's account."""

    def spent(pair: KeyPair) -> Awaitable[str]:
        bench.calls.append(pair.access_key)
        raise QuotaExhausted("spent")

    for _ in range(2):
        with pytest.raises(QuotaExhausted):
            await bench.rotation.use(Operation.SD_GET_PROGRESS, spent)
    assert bench.calls == ["one"]
    bench.now += REFUSAL_SECONDS
    assert await bench.ask() == "one"


async def test_rotation_begins_with_the_next_pair_where_there_is_no_other(tmp_path: Path) -> None:
    """A next pair alone is probed and signs; the active one takes over once it exists."""
    bench = Bench(tmp_path)
    bench.mount(active="", next="two")
    bench.known = {"one", "two"}
    bench.begin()
    assert bench.credentials.has_any_pair
    assert bench.signing() is None
    assert await bench.ask() == "two"
    assert bench.signing() == ("next", 1)
    bench.mount(active="one")
    bench.credentials.reload()
    assert await bench.ask() == "one"


@pytest.mark.parametrize("same", [True, False])
async def test_rotation_without_another_pair_returns_the_refusal(tmp_path: Path, *, same: bool) -> None:
    """Without a different next pair, the refusal is returned after one call."""
    bench = Bench(tmp_path)
    bench.mount(active="one", **({"next": "one"} if same else {}))
    bench.begin()
    assert await bench.refused() == ["one"]
    assert await bench.refused() == []


async def test_rotation_without_any_pair_makes_no_call(tmp_path: Path) -> None:
    """Without credentials callers receive an error, and no call is made."""
    bench = Bench(tmp_path)
    bench.begin()
    with pytest.raises(KeyPairMissing, match="no credentials"):
        await bench.ask()
    assert bench.calls == []


async def test_rotation_logs_a_replaced_pair_once(bench: Bench) -> None:
    """Calls with a replaced pair that are refused late add no log lines, and read no files."""
    await bench.ask()
    refuse = asyncio.Event()

    async def answer_late(pair: KeyPair) -> str:
        if pair.access_key == "one":
            await refuse.wait()
        return await bench.answer(pair)

    late = [
        asyncio.create_task(bench.rotation.use(Operation.SD_GET_PROGRESS, answer_late)) for _ in range(60)
    ]
    await asyncio.sleep(0)
    bench.mount(active="three")
    bench.known = {"three"}
    with capture_logs() as lines:
        refuse.set()
        assert await asyncio.gather(*late) == ["three"] * 60
    refusals = [line for line in lines if line["event"] == "credentials_refused"]
    assert [(line["slot"], line["generation"]) for line in refusals] == [("active", 1)]
