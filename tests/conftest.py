"""What tests of several rooms share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import torch
from turns import Files, order, turn, wants_quiet

from slicevit import cli

if torch.backends.cpu.get_cpu_capability() != "AVX512":  # where MKL's last bit depends on strides with one thread too
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: one thread each, and each of their children
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, quiet ones last."""
    items.sort(key=order)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files:
    """Which worker runs what."""
    return Files(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Workers take turns where a test wants the machine for itself."""
    with turn(alone=wants_quiet(item)):
        return (yield)


@pytest.fixture(autouse=True, scope="module")
def _frozen_libraries() -> None:
    """What is loaded by now is left out of garbage collections, which walk over a million objects without it."""
    gc.collect()
    gc.freeze()


def _one_thread() -> Iterator[None]:
    """With several threads MKL splits a product by its strides, and the last bit may differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


one_thread = pytest.fixture(_one_thread, name="one_thread")
one_thread_a_module = pytest.fixture(_one_thread, name="one_thread_a_module", scope="module")  # its fixtures too


@pytest.fixture(scope="session")
def train_quickly() -> Callable[[list[str]], None]:
    """`slicevit train` with these flags, in this process, without measuring latency for long."""

    def train(flags: list[str]) -> None:
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("slicevit.training.loop.LATENCY_SECONDS", 0.01)
            cli.main(["train", *flags])
        torch.set_num_threads(threads)

    return train
