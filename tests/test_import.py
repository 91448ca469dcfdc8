"""What importing costs: the operators need torch and triton, nothing else.  What a wheel holds."""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sra_fast

ROOT = Path(__file__).parents[1]
ENGINE_ONLY = (
    "deepspeed",
    "jsonargparse",
    "yaml",
    "sklearn",
    "scipy",
    "matplotlib",
    "tensorboard",
    "safetensors",
    "PIL",
    "tqdm",
)


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in out.stdout.split()}


def test_sampling_does_not_need_deepspeed():
    assert "deepspeed" not in modules_after(
        "import sra_fast.checkpoint.load_model, sra_fast.sampling.generate, sra_fast.plots.report"
    )


def test_ops_and_models_need_torch_and_triton_only():
    baseline = modules_after("import torch, triton, triton.language")
    added = modules_after("import sra_fast.ops, sra_fast.models") - baseline
    assert {"sra_fast"} <= added
    assert not added & set(ENGINE_ONLY), added
    assert not {
        name for name in added if name not in sys.stdlib_module_names and name != "sra_fast"
    }, added


# what a wheel is built from
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "sra_fast", "kernels", "configs")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A wheel of a copy of the tree: the build writes files into its source folder."""
    # asked without importing: pip and setuptools each bring another distutils into the process
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    if not {"pip", "setuptools"} <= installed:
        pytest.skip("needs pip and setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, source / name, ignore=skipped)
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--quiet", "--disable-pip-version-check", "--wheel-dir", str(folder), str(source)]
    environment = {key: value for key, value in os.environ.items() if key != "SRA_FAST_BUILD_EXT"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_holds_all_of_the_package(wheel):
    """Every file of the package, the kernels and the configurations; nothing at the top but the
    package.
    """
    expected = {"sra_fast/py.typed"}
    for folder in ("sra_fast", "kernels", "configs"):
        inside = "" if folder == "sra_fast" else "sra_fast/"
        for suffix in ("*.py", "*.yaml", "*.json"):
            for path in (ROOT / folder).rglob(suffix):
                expected.add(inside + path.relative_to(ROOT).as_posix())
    # in a wheel the kernels are there: the signpost to /kernels is not needed
    expected.remove("sra_fast/kernels/__init__.py")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == sra_fast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "sra-fast contributors"
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    requirements = metadata.get_all("Requires-Dist")
    of_extra = {
        extra: {r.partition(";")[0].strip() for r in requirements if f'extra == "{extra}"' in r}
        for extra in metadata.get_all("Provides-Extra")
    }
    everything = set().union(*(of_extra[extra] for extra in of_extra if extra != "flash"))
    assert of_extra["all"] == everything
    assert not any(re.match(r"flash|apex", requirement) for requirement in everything)


def test_an_installed_wheel_finds_kernels_and_configurations(wheel, tmp_path):
    """Away from the checkout, as after `pip install`."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sra_fast, sra_fast.kernels.adaln as kernels; from sra_fast.models import create_model; "
        "print(sra_fast.configs_folder(), kernels.__file__, sep='\\n')"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    configs, kernels = done.stdout.splitlines()
    assert Path(configs) == tmp_path / "sra_fast" / "configs"
    assert Path(kernels) == tmp_path / "sra_fast" / "kernels" / "adaln.py"
    assert (Path(configs) / "digits.yaml").is_file()
    assert (Path(configs) / "deepspeed" / "zero2.json").is_file()


def test_a_checkout_has_its_configurations_in_the_root():
    assert sra_fast.configs_folder() == ROOT / "configs"
