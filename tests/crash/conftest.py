"""Runs are spread over all processors; the count of what was tried comes last."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pytest

from tests.crash.counting import tried

Spread = Callable[..., None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name == "test_tried.py")  # stable: the others keep their order


def _quiet() -> None:
    logging.disable(logging.CRITICAL)  # damage that is found is logged, thousands of times here


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context, initializer=_quiet) as pool:
        yield pool


@pytest.fixture
def spread(pool: ProcessPoolExecutor) -> Spread:
    """Run a function for all of a list of arguments, each in some process, and add up what they have tried."""

    def run(function: Callable[..., dict[str, int]], arguments: list[tuple[Any, ...]]) -> None:
        futures: list[Future[dict[str, int]]] = [pool.submit(function, *one) for one in arguments]
        try:
            for future in futures:
                tried.update(future.result())
        finally:
            for future in futures:
                future.cancel()

    return run
