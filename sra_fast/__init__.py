"""sra-fast: a training engine for Self-Representation Alignment (SRA, arXiv 2505.02831)."""

from pathlib import Path

__version__ = "0.1.0"


def configs_folder() -> Path:
    """The folder of the configurations: ``digits.yaml`` and the others, ``ablations/``, ``deepspeed/``.

    In a wheel this is ``sra_fast/configs``. In a checkout it is ``configs`` in the root.
    """
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
