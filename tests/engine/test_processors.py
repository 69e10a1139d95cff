"""The same bytes on any processor of an architecture: NumPy's and the C library's code for newer ones switched off."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from numpy._core import _multiarray_umath

from bncli.numerics import compiled

SCRIPT = """
import hashlib, warnings
import numpy as np
import bncli
from bncli.numerics import compiled
from bncli.stats import container

warnings.simplefilter("ignore")
rng = np.random.default_rng(5)
x = rng.normal(3, 2, (20_000, 256)).astype("f4")
x[::7, ::5] = np.nan


def show(**options):
    arrays, attributes = container.unpack(bncli.fit(x, nan="omit", batch_size=37, **options).to_bytes(), "s")
    del attributes["provenance"]
    content = sorted((name, array.tobytes()) for name, array in arrays.items()), sorted(attributes.items())
    print(hashlib.sha256(repr(content).encode()).hexdigest())


print(compiled.NAME)
for momentum in (0.9, 0.99, 0.999, 1 - 1e-12, "none"):
    for init in ("debias", "unit"):
        show(momentum=momentum, init=init)
"""


def levels() -> dict[str, dict[str, str]]:
    """Environments in which this processor looks like an older one."""
    found = {"as it is": {}}
    umath = vars(_multiarray_umath)
    present = [name for name in umath["__cpu_dispatch__"] if umath["__cpu_features__"].get(name)]
    for i, name in enumerate(present):
        found[f"without {name}"] = {"NPY_DISABLE_CPU_FEATURES": " ".join(present[i:])}
    tunables = "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA,-FMA4"
    found["C library of an older one"] = {"GLIBC_TUNABLES": tunables}
    return found


@pytest.mark.parametrize("kernel", ["c", "numpy"])
def test_statistics_have_the_same_bytes(kernel: str) -> None:
    if kernel == "c" and not compiled.AVAILABLE:
        pytest.skip("the compiled kernel is not built")
    results = {}
    for name, changed in levels().items():
        environment = os.environ | {"BN_KERNEL": kernel} | changed
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (name, done.stderr)
        results[name] = done.stdout.splitlines()
    first = results["as it is"]
    assert (first[0], len(first)) == (kernel, 11)
    assert len(set(first)) == 11  # what is compared is not always one and the same
    for name, found in results.items():
        assert found == first, name
