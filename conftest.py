"""Settings for all tests."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in generate.py, before anything imports PyTorch
