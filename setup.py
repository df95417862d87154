"""Build clipvip._C with CMake and Ninja; pyproject.toml has everything else."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Build by CMake in a folder that stays, so that a second build is incremental."""

    def build_extension(self, ext: Extension) -> None:
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        arguments = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": self.ninja(),
            "CLIPVIP_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "CLIPVIP_PYBIND11_INCLUDE": str(self.pybind11_headers(build)),
            "CLIPVIP_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "CLIPVIP_OUTPUT_DIR": str(build / "module"),
            "CLIPVIP_CUDA": self.cuda(),
        }
        # CMake caches this: a build for one GPU must not restrict the next, which names none.
        forget = ["-UCMAKE_CUDA_ARCHITECTURES"]
        if architectures := os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
            arguments["CMAKE_CUDA_ARCHITECTURES"] = architectures
        definitions = [f"-D{name}={value}" for name, value in arguments.items()]
        self.cmake("-S", str(ROOT), "-B", str(build), "-G", "Ninja", *forget, *definitions)
        self.cmake("--build", str(build), "--target", "_C")
        # Copy under a temporary name: a process that has the old module loaded keeps that file.
        partial = target.with_suffix(".partial")
        shutil.copy2(build / "module" / target.name, partial)
        partial.replace(target)

    @staticmethod
    def cmake(*arguments: str) -> None:
        if subprocess.run(["cmake", *arguments]).returncode:
            sys.exit("clipvip: the compiled core could not be built; see CMake's message above")

    @staticmethod
    def cuda() -> str:
        """Return CLIPVIP_CUDA as CMake takes it; AUTO builds CUDA kernels where nvcc is found."""
        given = os.environ.get("CLIPVIP_CUDA", "")
        if given not in ("", "0", "1"):
            sys.exit(f"clipvip: CLIPVIP_CUDA is {given!r}, expected 0 or 1")
        return {"": "AUTO", "0": "OFF", "1": "ON"}[given]

    @staticmethod
    def ninja() -> str:
        path = shutil.which("ninja")
        if path is None:
            sys.exit("clipvip: ninja was not found; `pip install ninja` or build with isolation")
        return path

    @staticmethod
    def pybind11_headers(build: Path) -> Path:
        """Copy the headers to a path that stays the same, and return it.

        Build isolation puts them in another temporary folder each time, which would change every
        command line that names them and so rebuild everything.
        """
        import pybind11

        headers = build / f"pybind11-{pybind11.__version__}"
        if not headers.exists():
            partial = headers.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(pybind11.get_include(), partial)
            partial.rename(headers)
        return headers


# The benchmark suites are included, so that `clipvip bench` runs wherever the package is installed.
setup(
    packages=[*find_packages(include=["clipvip", "clipvip.*"]), "clipvip_bench"],
    package_dir={"clipvip_bench": "bench"},
    ext_modules=[Extension("clipvip._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
