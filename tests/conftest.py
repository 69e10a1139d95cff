"""Settings of the whole test run: where the helpers are, Hypothesis without chance, and the peers."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # `import helpers`, also with --import-mode=importlib

settings.register_profile(
    "bn",
    derandomize=True,  # the same examples in every run
    deadline=None,  # a slow machine is no failure
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile(os.environ.get("BN_HYPOTHESIS_PROFILE", "bn"))


# a shell starts what runs in the background with SIGINT ignored, and children inherit that; the tests send it
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "peer: compares with another package (torch, onnx, netCDF4 …), skipped where they are missing"
    )
