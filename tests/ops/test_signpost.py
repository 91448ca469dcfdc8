"""Type checkers find every kernel file through sra_fast/kernels/__init__.py."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_signpost_names_every_kernel_file():
    tree = ast.parse((ROOT / "sra_fast/kernels/__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    named = [alias.name for node in imports if node.module == "kernels" for alias in node.names]
    assert named == sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
