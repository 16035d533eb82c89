"""Settings and options of the tests."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in generate.py, before anything imports PyTorch


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=2500, help="mutated files in test_fuzz.py (default: %(default)s)")
    parser.addoption("--processes", type=int, default=3,
                     help="processes in a row that must agree (default: %(default)s)")
