"""What is wrong with an option, in one line: which one and where it stands, what was expected, what
came.

The parser's own messages have up to ten lines, name no file, and know no option that was meant.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

import jsonargparse
import yaml

from sra_fast.utils.yaml_loader import read_config

# in the parser's messages: an option, the types that it may have, and the value it was given
KEY = re.compile(r'Parser key "([^"]+)"')
KEY_BEFORE = re.compile(r'Parser key "([^"]+)":')
EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value: |\n|$)")
VALUE = re.compile(r"(?:Got|Given) value: (.*)", re.DOTALL)
# of an option that may be a list of something simple, among others: its types, and the value as a
# whole. The message has the part that is wrong as well
TYPES_AND_VALUE = re.compile(
    r"Subtypes: \[([^\n]*\blist\[\w+\][^\n]*)\]\n.*Given value: (.*)", re.DOTALL
)
# of a value that should be a dataclass inside of another type: how else the parser would take one
NO_DATACLASS = re.compile(
    r"Not a valid subclass of \w+(\. Got value: .*?)\s+Subclass types expect.*", re.DOTALL
)
# the same of an option that does not exist: in a file, in a section of a file, as an argument
UNKNOWN = (
    re.compile(r"Option '([^']+)' is not accepted"),
    re.compile(r"Group '([^']+)' does not accept option '([^']+)'"),
    re.compile(r"unrecognized arguments: --([^\s=]+)"),
)
# the parser's word for a type -> ours
WORDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'list'>": "a list",
    "list[float]": "a list of numbers",
    "list[int]": "a list of whole numbers",
    "list[str]": "a list of texts",
    "<class 'dict'>": "options by name",
    "<class 'NoneType'>": "null",
    # no option has a tuple of anything else
    "<class 'tuple'>": "two numbers",
    "tuple with 2 elements": "two numbers",
}


class Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one line, with exit code 2.

    Attributes:
        given: the arguments that are parsed; whoever parses sets them.
    """

    given: list[str] = []

    def error(self, message: str, ex: Exception | None = None):
        if not self.exit_on_error:
            # a parser inside of another one, which tells whose part this is
            super().error(message, ex)
        # the names of all options, the sections among them
        known = [name for name, _ in self.get_defaults().items(branches=True)]
        self.exit(2, f"error: {one_line(message, known, config_files(self.given), self.given)}\n")


def one_line(message: str, known: Iterable[str], files: list[Path], arguments: list[str]) -> str:
    """The parser's message in one line.

    Args:
        message: of the parser, or one that is in one line already.
        known: the names of all options, with their sections.
        files: what ``--config`` names, the later ones win.
        arguments: of the command line, which win over the files.
    """
    for pattern in UNKNOWN:
        found = pattern.search(message)
        if found:
            # an option inside of another one, whose name the parser tells before it
            name = _joined([*KEY.findall(message), ".".join(found.groups())])
            return _unknown(name, list(known), files, arguments)
    message = NO_DATACLASS.sub(r"Expected a <class 'dict'>\1", message)
    keys = KEY.findall(message)
    expected = EXPECTED.findall(message)
    value = VALUE.search(message)
    several = TYPES_AND_VALUE.search(message)
    if several:
        expected = several[1].split(", ")
    if keys and expected and value:
        name = _joined(keys)
        got = several[2] if several else value[1]
        kinds = " or ".join(dict.fromkeys(_in_words(kind) for kind in expected))
        where = _where(name, files, arguments)
        return f"{name}{where}: expected {kinds}, got {' '.join(got.split())}"
    return " ".join(KEY_BEFORE.sub(r"\1:", message).split())


def config_files(arguments: list[str]) -> list[Path]:
    """The files that the arguments name with ``--config`` and that are there."""
    words = [argument.partition("=") for argument in arguments]
    named = [
        value if equals else (arguments[i + 1] if i + 1 < len(arguments) else "")
        for i, (option, equals, value) in enumerate(words)
        if option == "--config"
    ]
    return [Path(name) for name in named if Path(name).is_file()]


def _joined(keys: list[str]) -> str:
    """The name of an option of which the parser tells the outer parts first."""
    name = ""
    for key in keys:
        # an inner part may repeat the outer ones
        name = key if not name or key.startswith(f"{name}.") or key == name else f"{name}.{key}"
    return name


def _in_words(kind: str) -> str:
    literal = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
    if literal:
        choices = [choice.strip().strip("'") for choice in literal[1].split(",")]
        return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
    return WORDS.get(kind, kind if kind.startswith("<") else f"a {kind}")


def _unknown(name: str, known: list[str], files: list[Path], arguments: list[str]) -> str:
    """There is no such option; one that is spelled alike, or is in another section, may be
    meant.
    """
    where = _where(name, files, arguments)
    # as it was written: on the command line, or in a file
    dashes = "" if where else "--"
    meant = _meant(name, known)
    question = f", did you mean {dashes}{meant}?" if meant else ""
    return f"there is no option {dashes}{name}{where}{question}"


def _meant(name: str, known: list[str]) -> str | None:
    """The option that was probably meant by a name that is none."""
    *section, last = name.split(".")
    sections = [other for other in known if "." not in other]
    # optim.lr for somebody who looks for it below train
    elsewhere = [other for other in known if "." in other and other.rsplit(".", 1)[1] == last]
    if elsewhere:
        return elsewhere[0]
    if not section:
        alike = difflib.get_close_matches(last, sections, 1)
    elif section[0] not in sections:
        # the section is the mistake, and not what stands below it
        close = difflib.get_close_matches(section[0], sections, 1)
        alike = [".".join([*close, *section[1:], last])] if close else []
    else:
        beside = [other.rsplit(".", 1)[1] for other in known if other.startswith(f"{section[0]}.")]
        alike = [f"{section[0]}.{other}" for other in difflib.get_close_matches(last, beside, 1)]
    return next((other for other in alike if other in known), None)


def _where(name: str, files: list[Path], arguments: list[str]) -> str:
    """`` in FILE`` for an option that stands in a file; nothing if the command line has it."""
    named = {argument.partition("=")[0].removeprefix("--") for argument in arguments}
    parts = name.split(".")
    if any(".".join(parts[:length]) in named for length in range(1, len(parts) + 1)):
        return ""
    holding = [file for file in files if _holds(file, parts)]
    return f" in {holding[-1]}" if holding else ""


def _holds(file: Path, parts: list[str]) -> bool:
    try:
        value = read_config(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    for part in parts:
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True
