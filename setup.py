"""The compiled kernel, built when there is a compiler; without one bn computes with NumPy."""

import sys
import sysconfig

from setuptools import Extension, setup

# The kernel is loaded with ctypes and uses nothing of CPython, so one build serves every version from 3.10 on. The name
# and the wheel's tag say so where the interpreter has a stable ABI: not on PyPy or a free-threaded build.
LIMITED = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
SOURCES = ("_blocks.c", "_moments.c", "_bytes.c", "_normalizing.c", "_learning.c")

setup(
    ext_modules=[
        Extension(
            "bncli.numerics._blocks",
            [f"bncli/numerics/{name}" for name in SOURCES],
            depends=["bncli/numerics/_vectors.h", "bncli/numerics/_sums.h"],
            define_macros=[("Py_LIMITED_API", "0x030A0000")] if LIMITED else [],
            py_limited_api=LIMITED,
            libraries=["m"],  # exp, expm1, log
            # the same bits everywhere: no fused multiply-add, no reordering; -fno-trapping-math, since nobody enables
            # floating-point exceptions, lets GCC vectorize a choice between two values
            extra_compile_args=["-O3", "-std=c11", "-ffp-contract=off", "-fno-trapping-math", "-g0"],
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
)
