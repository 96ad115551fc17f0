"""Joules that a machine has used, by its own counters."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_ZONES = "intel-rapl:[0-9]*"  # of AMD's processors too; their parts have a second colon

Joules = Callable[[], float]


def joules(device: str) -> Joules | None:
    """A counter of joules that only grows: of all processor packages (Linux's RAPL), or of the current GPU (NVML).

    It counts all that the device does, for whatever program, idle power included. None where the system has no such
    counter or does not let this user read it (RAPL is root's alone on most systems).

    Args:
        device: cpu or cuda.
    """
    return _of_gpu() if device == "cuda" else _of_packages()


def joules_of(call: Callable[[], object], counter: Joules, seconds: float) -> float:
    """Joules of a call, which is repeated for at least so many seconds."""
    calls, before, end = 0, counter(), time.perf_counter() + seconds
    while calls == 0 or time.perf_counter() < end:
        call()
        calls += 1
    return (counter() - before) / calls


def _of_packages() -> Joules | None:
    zones = [zone for zone in sorted(POWERCAP.glob(_ZONES)) if zone.name.count(":") == 1]
    try:
        packages = [_Package(zone) for zone in zones if (zone / "name").read_text().startswith("package")]
    except (OSError, ValueError):
        return None
    return (lambda: sum(package() for package in packages)) if packages else None


class _Package:
    """Joules of one package since it was first read; the kernel's counter begins anew at its range."""

    def __init__(self, zone: Path):
        self._counter = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text())
        self._last, self._sum = int(self._counter.read_text()), 0

    def __call__(self) -> float:
        now = int(self._counter.read_text())
        self._sum += now - self._last if now >= self._last else now + self._range - self._last
        self._last = now
        return self._sum / 1e6


def _of_gpu() -> Joules | None:
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no package, no library, no permission, an older GPU: each has its own
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
