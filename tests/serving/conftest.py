"""What the tests of servers share."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True)
def _stays_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of this process neither freezes what is there nor, when it stops, thaws all the libraries."""
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(gc, "unfreeze", lambda: None)
