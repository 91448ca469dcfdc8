"""The checkout's files on the documentation site: a hook of mkdocs.

Links in README.md and docs/ are written for readers of the checkout. Here README.md becomes the
first page, and a file outside of docs/ that a page links to becomes part of the site.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# pages of the site that stand outside of docs/, by their file in the checkout
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
LINK = re.compile(r"\]\((?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def source_of(page: str) -> Path:
    """The file in the checkout of a page of the site, given by its address."""
    names = {address: name for name, address in PAGES.items()}
    return ROOT / names[page] if page in names else DOCS / page


def address_of(file: Path) -> str:
    """The address on the site of a file in the checkout."""
    if file.is_relative_to(DOCS):
        return file.relative_to(DOCS).as_posix()
    name = file.relative_to(ROOT).as_posix()
    return PAGES.get(name, f"checkout/{name}")


def linked_files(source: Path, text: str) -> dict[str, Path]:
    """``{link: file}`` for the links of a document that lead to files of the checkout."""
    found = {}
    for match in LINK.finditer(text):
        file = (source.parent / match["path"]).resolve()
        if file.is_file() and file.is_relative_to(ROOT):
            found[match["path"]] = file
    return found


def rewrite_links(page: str, text: str) -> str:
    """The links of a document as links between pages of the site.

    Links that lead to no file stay as they are, and the build refuses them.
    """
    files = linked_files(source_of(page), text)
    # relative to the folder of the page
    up = "../" * page.count("/")

    def rewritten(match: re.Match) -> str:
        if match["path"] not in files:
            return match[0]
        return f"]({up}{address_of(files[match['path']])}{match['anchor'] or ''})"

    return LINK.sub(rewritten, text)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside of docs/, and what the pages link to."""
    wanted = {address: ROOT / name for name, address in PAGES.items()}
    for source in (*(ROOT / name for name in PAGES), *sorted(DOCS.glob("*.md"))):
        for file in linked_files(source, source.read_text()).values():
            wanted[address_of(file)] = file
    for address, file in wanted.items():
        if files.get_file_from_path(address) is None:
            files.append(File.generated(config, address, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    return rewrite_links(page.file.src_uri, markdown)
