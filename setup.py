"""Only what setup.cfg cannot say: with ESPALIER_BUILD_KERNELS=1 a wheel carries the CUDA kernels.

    ESPALIER_BUILD_KERNELS=1 pip wheel --no-deps .

Such a wheel fits any Python 3 and any torch on its platform. Without the variable nothing is built,
and machines with nvcc build the kernels when they first need them.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

WANTED = os.environ.get("ESPALIER_BUILD_KERNELS", "") not in ("", "0")


def load_build():
    """models/kernels/build.py by its path: the package is not installed yet."""
    path = Path(__file__).parent / "models" / "kernels" / "build.py"
    spec = importlib.util.spec_from_file_location("espalier_kernels_build", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """Copies the packages, then compiles the kernels beside them."""

    def run(self):
        super().run()
        build = load_build()
        folder = Path(__file__).parent if self.editable_mode else Path(self.build_lib)
        build.build(folder / build.AOT.relative_to(Path(__file__).parent.resolve()))


class PlatformWheel(bdist_wheel):
    """Tagged for this platform and every Python 3: the library uses no Python ABI."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel} if WANTED else {})
