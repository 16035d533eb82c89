"""Settings, options and fixtures of the tests."""

import os

# As in generate.py, before anything imports PyTorch.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import pytest


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=2500,
                     help="mutated files in test_fuzz.py (default: %(default)s)")
    parser.addoption("--processes", type=int, default=3,
                     help="processes in a row that must agree (default: %(default)s)")


@pytest.fixture(scope="session")
def smollm():
    """The default model and its tokenizer, in float32."""
    import checkpoint

    return checkpoint.load()
