"""What pyproject.toml cannot say of the build: one C file, left out where it does not compile, and bitshard.pth, which
has to lie beside the packages, not in one."""

from setuptools import Extension, setup
from setuptools.command.build_py import build_py


class BuildWithPth(build_py):
    def run(self):
        super().run()
        # of an editable install nothing is built but the wheel's own folder
        place = self.get_finalized_command("install").install_purelib if self.editable_mode else self.build_lib
        self.copy_file("src/bitshard.pth", place)


# opened with ctypes (kernels/cpu.py), so it knows neither torch's nor Python's ABI; libgomp is the one torch has loaded
setup(
    cmdclass={"build_py": BuildWithPth},
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
    ],
)
