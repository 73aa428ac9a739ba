import os
import shutil
import tempfile

import pytest
import torch
from hypothesis import settings

_CACHE = pytest.StashKey[str]()

# Several test processes share two cores: more threads each would only get in each other's way.
torch.set_num_threads(1)

# Circuits of unlike sizes take unlike times, and some backends compile on first use.
settings.register_profile("qconv", deadline=None, max_examples=30, print_blob=True)
settings.load_profile("qconv")


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
