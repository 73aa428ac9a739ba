import os

import pytest
import torch
from hypothesis import settings

# Several test processes share two cores: more threads each would only get in each other's way.
torch.set_num_threads(1)

# Circuits of unlike sizes take unlike times, and some backends compile on first use.
settings.register_profile("qconv", deadline=None, max_examples=30, print_blob=True)
settings.load_profile("qconv")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("QCONV_DATA"):
        return
    skip = pytest.mark.skip(reason="real image files are not here: set QCONV_DATA to their folder")
    for item in items:
        if "data" in item.keywords:
            item.add_marker(skip)
