import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# what each extra adds; README.md says what it is for
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
    "features": ["transformers>=5"],
    "text": ["transformers>=5"],
    "hub": ["datasets>=3", "huggingface_hub>=0.30"],
    "plots": ["matplotlib>=3.8"],
    "photos": ["scikit-image>=0.26", "scikit-learn>=1.4"],
    "wandb": ["wandb>=0.31"],
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.5",
        "pytest-benchmark>=4",
        "pybind11>=2.12",
        "wandb>=0.31",
        "accelerate>=1.15",
        "diffusers>=0.30",
        "transformers>=5",
    ],
    "bench": ["pytest>=8", "pytest-benchmark>=4", "matplotlib>=3.8"],
    "docs": ["mkdocs-material>=9.8", "mkdocstrings[python]>=1.0"],
    "dev": ["ruff>=0.17", "basedpyright>=1.40", "codespell>=2.4", "pre-commit>=4"],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})
# not part of "all": it is compiled on the machine, which takes about an hour
EXTRAS["flash"] = ["flash-attn>=2"]

ARCHITECTURES = (80, 90, 100)


def version() -> str:
    """``sra_fast.__version__``, the one place where the version stands; read as text, because a build has no torch."""
    text = Path("sra_fast/__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


class BuildCuda(build_ext):
    """Compile each .cu file with one call of nvcc.

    They include no headers of torch, so any version of torch loads the result.
    """

    def build_extension(self, ext):
        import pybind11

        nvcc = find_nvcc()
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        listed = subprocess.run(
            [nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True
        )
        known = listed.stdout.split()
        archs = [a for a in ARCHITECTURES if f"compute_{a}" in known]
        # machine code for each architecture, and PTX of the newest for GPUs that are newer
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        host = "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-strict-aliasing"
        options = ["-O3", "-std=c++17", "--shared", "--threads=0", host]
        subprocess.run(
            [nvcc, *options, *targets, *includes, "-o", str(output), *ext.sources], check=True
        )


def cuda_extension() -> dict:
    """Arguments of setup() that build csrc/, if SRA_FAST_BUILD_EXT=1 asks for it and nvcc exists."""
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
        # pip reads this and installs pybind11 into its isolated build environment
        "setup_requires": [] if find_spec("pybind11") else ["pybind11>=2.12"],
    }


setup(
    name="sra-fast",
    version=version(),
    description="Self-Representation Alignment for diffusion transformers, at the speed of the plain step",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="sra-fast contributors",
    license_expression="Apache-2.0",
    keywords=[
        "diffusion transformers",
        "self-representation alignment",
        "SRA",
        "SiT",
        "DiT",
        "Triton",
        "DeepSpeed",
        "ZeRO",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # the oldest versions on which the tests of the operators have run
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require=EXTRAS,
    packages=find_packages(include=["sra_fast", "sra_fast.*"], exclude=["sra_fast.kernels"])
    + ["sra_fast.kernels", "sra_fast.configs"],
    # in a checkout kernels and configurations are folders of the root; in a wheel they are inside the package
    package_dir={"sra_fast.kernels": "kernels", "sra_fast.configs": "configs"},
    package_data={
        "sra_fast": ["py.typed"],
        "sra_fast.configs": ["*.yaml", "ablations/*.yaml", "alignment/*.yaml", "deepspeed/*.json"],
    },
    entry_points={
        "console_scripts": ["sra-fast=sra_fast.__main__:main"],
        # torch.compile finds the backend by its name, without an import of ours
        "torch_dynamo_backends": ["sra_fast = sra_fast.integrations:backend"],
    },
    **cuda_extension(),
)
