"""Creates the store that the settings ask for: in memory, or shared through Valkey or Redis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gateway.domain.entity_tag import EntityTags
from gateway.settings.errors import UnusableSetting
from gateway.settings.extras import describe_missing
from gateway.settings.model import Settings
from gateway.stores.base import Store
from gateway.stores.memory import MemoryStore
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor


def create_store(
    settings: Settings,
    *,
    tags: EntityTags,
    identity: Callable[[], str],
    redactor: Redactor,
    metrics: Metrics,
) -> Store:
    """Return the store, which is not open yet. `identity` names the account whose data replicas share.

    Raises: UnusableSetting if the client of the store is not installed.
    """
    cache = settings.cache
    limits: dict[str, Any] = {
        "max_tasks": cache.max_tasks,
        "max_bytes": cache.max_bytes,
        "min_keep_stale_seconds": max(cache.stale_while_revalidate_seconds, cache.stale_if_error_seconds),
    }
    if not settings.store.url.get_secret_value():
        return MemoryStore(**limits)
    try:
        from gateway.stores.valkey.store import ValkeyStore  # noqa: PLC0415  # its client is an extra
    except ModuleNotFoundError as exc:
        raise UnusableSetting("store", "url", describe_missing(exc.name, extra="valkey")) from exc
    return ValkeyStore(
        settings.store,
        tags=tags,
        lifetimes=cache.lifetimes,
        error_seconds=cache.error_seconds,
        identity=identity,
        redactor=redactor,
        metrics=metrics,
        **limits,
    )
