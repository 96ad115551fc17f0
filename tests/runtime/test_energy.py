"""Joules by the machine's counters, on counters made here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slicevit.runtime import energy

RANGE = 10_000_000  # microjoules


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages, a part of the first, and the whole board."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    zones = (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "dram"), ("intel-rapl:1", "package-1"),
             ("intel-rapl:2", "psys"))  # fmt: skip
    for zone, name in zones:
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text(f"{RANGE}\n")
        (tmp_path / zone / "energy_uj").write_text("9000000\n")
    return tmp_path


def count(powercap: Path, zone: str, microjoules: int) -> None:
    (powercap / zone / "energy_uj").write_text(f"{microjoules}\n")


def test_the_packages_are_added_and_nothing_else(powercap: Path) -> None:
    counter = energy.joules("cpu")
    assert counter is not None
    assert counter() == 0.0
    count(powercap, "intel-rapl:0", 9_500_000)
    count(powercap, "intel-rapl:0:0", 9_700_000)
    count(powercap, "intel-rapl:2", 9_900_000)
    assert counter() == pytest.approx(0.5)
    count(powercap, "intel-rapl:1", 9_250_000)
    assert counter() == pytest.approx(0.75)


def test_a_counter_that_begins_anew(powercap: Path) -> None:
    counter = energy.joules("cpu")
    assert counter is not None
    count(powercap, "intel-rapl:0", 500_000)
    assert counter() == pytest.approx(1.5)
    count(powercap, "intel-rapl:0", 700_000)
    assert counter() == pytest.approx(1.7)


def test_joules_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Iterator[float] = iter(range(100))
    monkeypatch.setattr(energy.time, "perf_counter", lambda: next(clock))
    used = [0.0]

    def call() -> None:
        used[0] += 0.25

    assert energy.joules_of(call, lambda: used[0] + 7.0, seconds=10) == 0.25
    assert used[0] > 1.0


@pytest.mark.parametrize("what", ["no zones", "not readable", "no numbers"])
def test_without_a_counter_there_is_none(what: str, powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "no zones":
        monkeypatch.setattr(energy, "POWERCAP", powercap / "nothing")
    elif what == "not readable":

        def denied(self: Path, *args: object, **kwargs: object) -> str:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_text", denied)
    else:
        count(powercap, "intel-rapl:0", 5)
        (powercap / "intel-rapl:0" / "max_energy_range_uj").write_text("none")
    assert energy.joules("cpu") is None
