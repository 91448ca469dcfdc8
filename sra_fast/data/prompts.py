"""Prompts of a user: arguments of a command, or a file; and the file that samples have beside them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from sra_fast.data.captions import is_text
from sra_fast.utils.checks import require_that

# files of prompts; others have a prompt in each line too, but must be there
SUFFIXES = (".txt", ".json", ".jsonl")


def read_prompts(given: list[str]) -> list[str]:
    """The prompts that a user has given.

    Args:
        given: the path of a file (a prompt in each line, or in JSON or JSONL strings), or prompts.

    Raises:
        ValueError: there is no such file, it cannot be read, or a prompt is missing.
    """
    require_that(
        bool(given), "prompts must be the name of a file, or at least one prompt, got none"
    )
    if len(given) == 1 and _is_there(given[0]) and Path(given[0]).is_file():
        return _checked(_read_file(Path(given[0])))
    for text in given:
        require_that(bool(text.strip()), "prompts must not be empty, got an empty argument")
        fault = None
        if _is_there(text):
            fault = "a file or folder has this name (as a prompt it can be a line of a file)"
        elif text.lower().endswith(SUFFIXES):
            # a file that is missing must not become a picture of its name
            fault = "there is no such file"
        require_that(
            fault is None,
            f"prompts must be the name of one file, or prompts, got {text}: {fault}",
        )
    return _checked(list(given))


def _checked(prompts: list[str]) -> list[str]:
    """The prompts; ValueError for one that is no text."""
    for prompt in prompts:
        require_that(is_text(prompt), f"prompts must be valid Unicode text, got {prompt!a}")
    return prompts


def _is_there(text: str) -> bool:
    """Whether a prompt is the name of something that exists."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        # too long for a name, or with a character that no name has
        return False


def _read_file(file: Path) -> list[str]:
    try:
        # some editors put a mark before the first line
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {file} cannot be read: {error}") from None
    suffix = file.suffix.lower()
    if suffix in (".json", ".jsonl"):
        prompts = _of_json(file, text, lines=suffix == ".jsonl")
    else:
        # not splitlines: a prompt may hold the line ends of other alphabets
        prompts = [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []
        blank = [number for number, prompt in enumerate(prompts, start=1) if not prompt]
        require_that(
            not blank,
            f"prompts {file} must have a prompt in each line, {len(blank)} are blank, the first is "
            f"line {blank[0] if blank else 0} (a JSON file may have empty prompts)",
        )
    require_that(bool(prompts), f"prompts {file} holds no prompts")
    return prompts


def _of_json(file: Path, text: str, lines: bool) -> list[str]:
    """The strings of a JSON list, or of JSON ``lines``."""
    try:
        parts = [line for line in text.split("\n") if line.strip()] if lines else [text]
        held = [json.loads(part) for part in parts]
    except ValueError as error:
        raise ValueError(f"prompts {file} is no JSON: {error}") from None
    prompts = held if lines else held[0]
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        what = "a string in each line" if lines else "a list of strings"
        raise ValueError(f"prompts {file} must hold {what}, it holds something else")
    return prompts


def digest_of(prompts: Sequence[str]) -> str:
    """SHA-256 of the prompts of all images, in their order: that of ``prompts.jsonl``."""
    return hashlib.sha256(as_lines(prompts).encode()).hexdigest()


def as_lines(prompts: Sequence[str]) -> str:
    """The content of ``prompts.jsonl``: a JSON string in a line, for each image."""
    return "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts)
