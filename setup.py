"""The part of the build that pyproject.toml cannot say: one C file, left out where it does not compile."""

from setuptools import Extension, setup

# opened with ctypes (kernels/cpu.py), so it knows neither torch's nor Python's ABI; libgomp is the one torch has loaded
setup(
    ext_modules=[
        Extension(
            "bitshard.kernels._linear",
            ["csrc/linear.c"],
            depends=["csrc/linear.inc.c", "csrc/simd.h"],
            extra_compile_args=["-O3", "-g0", "-fopenmp", "-Wno-psabi"],
            extra_link_args=["-fopenmp"],
            py_limited_api=True,
            optional=True,
        )
    ]
)
