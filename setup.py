"""Builds the compiled kernel if there is a C compiler; without one bn computes with NumPy."""

import sys
import sysconfig

from setuptools import Extension, setup

# The kernel is loaded with ctypes and does not use the Python C API, so one build works with every version from 3.10 on.
# File name and wheel tag declare this if the interpreter has the stable ABI, which PyPy and free-threaded builds lack.
LIMITED = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
SOURCES = ("_blocks.c", "_extremes.c", "_moments.c", "_bytes.c", "_normalizing.c", "_learning.c", "_memory.c")

setup(
    ext_modules=[
        Extension(
            "bncli.numerics._blocks",
            [f"bncli/numerics/{name}" for name in SOURCES],
            depends=["bncli/numerics/_vectors.h", "bncli/numerics/_sums.h"],
            define_macros=[("Py_LIMITED_API", "0x030A0000")] if LIMITED else [],
            py_limited_api=LIMITED,
            libraries=["m"],  # exp, expm1, log
            # no fused multiply-add and no reordering, for the same bits everywhere; -fno-trapping-math lets GCC vectorize
            # a choice between two values, and floating-point exceptions are not enabled anyway
            extra_compile_args=["-O3", "-std=c11", "-ffp-contract=off", "-fno-trapping-math", "-g0"],
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
)
