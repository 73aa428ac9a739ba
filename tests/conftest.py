import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

_CACHE = pytest.StashKey[str]()

# Several test processes share two cores: more threads each would only get in each other's way.
torch.set_num_threads(1)

# Circuits of unlike sizes take unlike times, and some backends compile on first use.
settings.register_profile("qconv", deadline=None, max_examples=30, print_blob=True)
settings.load_profile("qconv")


@pytest.fixture(autouse=True)
def _compile_from_scratch() -> Iterator[None]:
    yield
    # torch counts what it compiled of a function that many layers share, and stops at some number in a process.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def pytest_configure(config: pytest.Config) -> None:
    # Compiled code of these very sources, for all processes of this run; workers inherit the variable.
    if not hasattr(config, "workerinput"):
        config.stash[_CACHE] = os.environ["QCONV_CACHE"] = tempfile.mkdtemp(prefix="qconv-test-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _CACHE in config.stash:
        shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("QCONV_DATA"):
        return
    skip = pytest.mark.skip(reason="real image files are not here: set QCONV_DATA to their folder")
    for item in items:
        if "data" in item.keywords:
            item.add_marker(skip)
