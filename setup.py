from setuptools import find_packages, setup

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
    "test": ["pytest>=8", "pytest-xdist>=3.5"],
    "bench": ["pytest>=8", "pytest-benchmark>=4", "matplotlib>=3.8"],
}

setup(
    name="sra-fast",
    version="0.1.0",
    description="Self-Representation Alignment for diffusion transformers, at the speed of the plain step",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    install_requires=["torch>=2.6", "triton>=3.2; platform_system == 'Linux'"],
    extras_require=EXTRAS,
    packages=find_packages(include=["sra_fast", "sra_fast.*"], exclude=["sra_fast.kernels"]) + ["sra_fast.kernels"],
    # in a checkout the device code lives in /kernels; in a wheel it becomes sra_fast/kernels
    package_dir={"sra_fast.kernels": "kernels"},
)
