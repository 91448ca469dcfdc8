import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

EXTRAS = {
    "train": [
        "deepspeed>=0.19",
        "numpy>=1.26",
        "jsonargparse[signatures]>=4.40",
        "PyYAML>=6",
        "tensorboard>=2.15",
        "safetensors>=0.4",
        "tqdm>=4.66",
        "pillow>=10",
    ],
    "eval": ["numpy>=1.26", "scipy>=1.11", "scikit-learn>=1.4"],
    "vae": ["diffusers>=0.30"],
    "plots": ["matplotlib>=3.8"],
    "test": ["pytest>=8", "pytest-xdist>=3.5", "pytest-benchmark>=4", "pybind11>=2.12"],
    "bench": ["pytest>=8", "pytest-benchmark>=4", "matplotlib>=3.8"],
}

ARCHITECTURES = (80, 90, 100)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


class BuildCuda(build_ext):
    """Compiles each .cu file with one call of nvcc; no torch headers, so any torch version loads the result."""

    def build_extension(self, ext):
        import pybind11

        nvcc, output = find_nvcc(), Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        known = subprocess.run(
            [nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True
        ).stdout.split()
        archs = [a for a in ARCHITECTURES if f"compute_{a}" in known]
        # machine code for each, and portable code of the newest for what comes after it
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        host = "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-strict-aliasing"
        options = ["-O3", "-std=c++17", "--shared", "--threads=0", host]
        subprocess.run(
            [nvcc, *options, *targets, *includes, "-o", str(output), *ext.sources], check=True
        )


def cuda_extension() -> dict:
    """What setup() needs for csrc/: nothing unless it is asked for and nvcc is there."""
    if os.environ.get("SRA_FAST_BUILD_EXT") != "1":
        return {}
    if find_nvcc() is None:
        print(
            "sra-fast: SRA_FAST_BUILD_EXT=1, but no nvcc; continuing without the CUDA extension",
            file=sys.stderr,
        )
        return {}
    return {
        "ext_modules": [Extension("sra_fast._ema_cuda", ["csrc/ema_update.cu"])],
        "cmdclass": {"build_ext": BuildCuda},
        # an isolated build of pip's asks for this and installs it
        "setup_requires": [] if find_spec("pybind11") else ["pybind11>=2.12"],
    }


setup(
    name="sra-fast",
    version="0.1.0",
    description="Self-Representation Alignment for diffusion transformers, at the speed of the plain step",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    # the oldest versions on which the tests of the operators have run
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require=EXTRAS,
    packages=find_packages(include=["sra_fast", "sra_fast.*"], exclude=["sra_fast.kernels"])
    + ["sra_fast.kernels"],
    # in a checkout the device code lives in /kernels; in a wheel it becomes sra_fast/kernels
    package_dir={"sra_fast.kernels": "kernels"},
    entry_points={"console_scripts": ["sra-fast=sra_fast.__main__:main"]},
    **cuda_extension(),
)
