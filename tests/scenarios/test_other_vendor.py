"""The faults that rivals die of, on a server that is not our emulator."""

from __future__ import annotations

import pytest

from other_vendor import OtherVendor
from presort.config import load
from presort.engine import Engine, Link
from presort.providers import provider
from presort.providers.base import Prompt
from presort.request import BatchKey, OutcomeKind, Payload
from presort.store import Store

COUNT = 10


@pytest.mark.parametrize("vendor", ["anthropic", "openai"])
@pytest.mark.parametrize(
    ("fault", "sent", "answered"),
    [
        ("", COUNT, COUNT),
        ("bad_row", COUNT, COUNT - 1),
        ("expired_row", COUNT + 1, COUNT),
        ("half_expired", COUNT + 5, COUNT),
        ("missing_row", COUNT + 1, COUNT),
        ("poll500", COUNT, COUNT),
        ("lost_create", COUNT, COUNT),
    ],
)
def test_faults(tmp_path, vendor, fault, sent, answered):
    """Finished rows are kept, only the rest is sent again, and each intent is one batch."""
    with OtherVendor(*filter(None, [fault])) as server:
        wire = provider(vendor)
        settings = load(batching={"flush_seconds": 0.05, "poll_interval_seconds": 0.05}, reconcile_window_seconds=1.5)
        engine = Engine(settings, Store.open(f"sqlite:///{tmp_path / 'presort.db'}"))
        base_url = server.url + ("/v1" if vendor == "openai" else "")
        payloads = []
        for number in range(COUNT):
            endpoint, body, headers = wire.compose(wire.default_model, Prompt("Name it.", f"Document {number}"))
            key = BatchKey(vendor, base_url, engine.account("k"), endpoint, wire.default_model, headers)
            payloads.append(Payload(key, body))
        stream = engine.stream(payloads, link=Link("k"))
        assert stream.wait(40)
        kinds = [outcome.kind for _, outcome in stream]
        engine.close()

    assert answered == kinds.count(OutcomeKind.SUCCEEDED)
    assert sent == len(server.asked) == len(set(server.asked))
    assert 0 == server.calls
