"""The compiled kernel, built when there is a compiler; without one bn computes with NumPy."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "bncli.numerics._blocks",
            ["bncli/numerics/_blocks.c", "bncli/numerics/_learning.c", "bncli/numerics/_normalizing.c"],
            depends=["bncli/numerics/_vectors.h"],
            # the same bits everywhere: no fused multiply-add, no reordering; floating-point traps, which nobody sets, keep
            # GCC from running a choice between two values on vectors
            extra_compile_args=["-O3", "-std=c11", "-ffp-contract=off", "-fno-trapping-math", "-g0"],
            optional=True,
        )
    ]
)
