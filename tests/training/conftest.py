"""Settings for all tests of the training package."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread_everywhere(one_thread: None) -> None:
    """Run every test here with one thread."""
