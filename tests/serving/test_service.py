"""The service by itself, on a fake engine."""

from __future__ import annotations

import gc

import pytest
from serving_fakes import TABLE, FakeEngine

pytestmark = pytest.mark.extra
for package in ("fastapi", "prometheus_client"):
    pytest.importorskip(package, reason=f'needs {package}: pip install "slicevit[serve]"')

from slicevit.serving.service import Service  # noqa: E402
from slicevit.serving.settings import Settings  # noqa: E402


@pytest.fixture(autouse=True)
def _stays_frozen() -> None:
    """Here a server does freeze what is there."""


def test_garbage_collection_passes_over_what_was_there_at_the_start() -> None:
    there = ["a container, which the collector tracks", []]

    def walked_over() -> bool:
        return any(each is there for each in gc.get_objects())

    service = Service(FakeEngine(), TABLE, Settings(slo_ms=100.0))
    assert walked_over()
    service.start()
    try:
        assert not walked_over()
    finally:
        service.stop()
    assert walked_over()
