"""The documentation site builds, and refuses what would lead a reader nowhere."""

import importlib.util
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the extra docs")
pytest.importorskip("mkdocstrings", reason="needs the extra docs")

from sra_fast import ops

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("site_links", ROOT / "docs/site_links.py")
site_links = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site_links)


def test_links_of_the_checkout_become_links_of_the_site():
    text = (
        "[a](docs/glossary.md), [b](CONTRIBUTING.md), [c](examples/dit_block.py), ![d](docs/images/steps.png), "
        "[e](#measured), [f](https://example.org/docs/glossary.md), `f[0](x)`, [g](docs/evaluate.md#options)"
    )
    assert site_links.rewrite_links("index.md", text) == (
        "[a](glossary.md), [b](CONTRIBUTING.md), [c](checkout/examples/dit_block.py), ![d](images/steps.png), "
        "[e](#measured), [f](https://example.org/docs/glossary.md), `f[0](x)`, [g](evaluate.md#options)"
    )
    # a page of docs/, and one in a folder of the site
    page = "[a](glossary.md), [b](../README.md), [c](../examples/dit_block.py)"
    expected = "[a](glossary.md), [b](index.md), [c](checkout/examples/dit_block.py)"
    assert site_links.rewrite_links("architecture.md", page) == expected
    # the build refuses what is left
    assert site_links.rewrite_links("index.md", "[a](docs/absent.md)") == "[a](docs/absent.md)"


def build(root: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(out)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_the_site_builds(tmp_path):
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in (tmp_path / "site").glob("*.html")}
    api = (tmp_path / "site/api.html").read_text()
    for name in (*ops.__all__, "create_model", "load_model"):
        assert f'.{name}"' in api, f"docs/api.md lacks {name}"
    # every argument of an operator is explained
    assert 'layout="bhtd"' in api.replace("&quot;", '"')
    index = (tmp_path / "site/index.html").read_text()
    assert "checkout/examples/dit_block.py" in index
    assert (tmp_path / "site/checkout/examples/dit_block.py").is_file()
    # a reader's browser asks nobody else
    for page in (tmp_path / "site").glob("*.html"):
        assert "fonts.googleapis.com" not in page.read_text()


def test_what_leads_nowhere_ends_the_build(tmp_path):
    """A link, an anchor, and a page that no menu shows."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    documents = [*(ROOT / name for name in site_links.PAGES), *ROOT.glob("docs/*.md")]
    linked = [site_links.linked_files(path, path.read_text()).values() for path in documents]
    for file in {ROOT / "mkdocs.yml", *documents, *chain.from_iterable(linked)}:
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    # there is no source whose docstrings could be read
    (tmp_path / "docs/api.md").write_text("# API\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    glossary = tmp_path / "docs/glossary.md"
    text = glossary.read_text()
    for wrong, message in (
        ("[a](absent.md)", "'absent.md'"),
        ("[a](evaluate.md#absent)", "#absent"),
        ("[a](../absent.py)", "'../absent.py'"),
    ):
        glossary.write_text(f"{text}\n{wrong}\n")
        done = build(tmp_path, tmp_path / "site")
        assert done.returncode != 0 and message in done.stderr, done.stderr
    glossary.write_text(text)
    (tmp_path / "docs/unlisted.md").write_text("# Unlisted\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and "unlisted.md" in done.stderr, done.stderr
