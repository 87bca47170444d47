"""Packaging with the native build inside it; the metadata stands in pyproject.toml.

`pip install .` never fails for want of torch or a compiler: the package then runs on its reference
and Triton kernels, carries its C++ and CUDA sources, and `python -m segkernels build` compiles them
later. `pip install --no-build-isolation .` sees the installed torch and compiles at once.
"""

import functools
import shutil
import sys
import types
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = types.ModuleType("segkernels")  # stands in for the package, whose front door needs torch
PACKAGE.__path__ = [str(ROOT / "segkernels")]
sys.modules["segkernels"] = PACKAGE

from segkernels.build import build  # noqa: E402
from segkernels.build_plan import REMEDY, Plan, make_plan  # noqa: E402
from segkernels.toolchain import BuildError  # noqa: E402


@functools.cache
def plan() -> Plan:
    try:
        made = make_plan()
    except BuildError as error:
        sys.exit(f"error: {error}")
    print(made.text(), flush=True)
    if not made.libraries:
        print(f"segkernels installs without native kernels; to compile them later: {REMEDY}")
    return made


class CarrySources(build_py):
    """An installation carries `csrc/` inside the package, so that it can be compiled later."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            installed = Path(self.build_lib) / "segkernels"
            shutil.rmtree(installed / "csrc", ignore_errors=True)
            shutil.copytree(ROOT / "csrc", installed / "csrc")
            for earlier in installed.glob("_*.so"):  # the build folder outlives a build
                earlier.unlink()


class CompileNative(build_ext):
    """Compiles into the checkout when editable, else into the wheel."""

    def run(self) -> None:
        here = self.inplace or self.editable_mode
        try:
            build(
                plan(), output=ROOT / "segkernels" if here else Path(self.build_lib) / "segkernels"
            )
        except BuildError as error:
            if plan().request != "auto":
                sys.exit(f"error: {error}")
            print(f"warning: {error}\nsegkernels installs without native kernels", file=sys.stderr)


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return bool(plan().libraries)


setup(distclass=NativeDistribution, cmdclass={"build_py": CarrySources, "build_ext": CompileNative})
