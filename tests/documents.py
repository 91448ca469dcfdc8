"""The commands that the documents show: found, parsed by the programs that they name, executed.

document_classes.py says what happens with which command.
"""

import argparse
import ast
import inspect
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from unittest.mock import patch

import jsonargparse
import torch
from foreign import network, weights
from launch import ROOT, Result, call, call_console, free_port, run_python
from PIL import Image
from toy_data import write_images, write_vae

from sra_fast.data.digits import Digits
from sra_fast.models import DiT
from sra_fast.plots.report import to_uint8

DOCUMENTS = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
    # lab-notes.md tells of commands as they were
    if path.name != "lab-notes.md"
]
# commands for a GPU: parsed, never executed by a test
WAITING = ROOT / "benchmarks/TODO.md"
# first words of a command. Some have no parser here: a document that uses one needs it
PROGRAMS = {
    *("accelerate", "deepspeed", "make", "pip", "pytest", "python", "python3", "sra-fast"),
    "torchrun",
}
# what the documents write where a reader puts a value of their own, and values that parse
PLACEHOLDERS = {
    "ARGS": [],
    "DIT": ["examples"],
    "LIGHTNINGDIT": ["examples"],
    "N": ["8"],
    "NAME": ["adaln"],
    "PATH": ["examples"],
    "RUN/config.yaml": ["configs/digits.yaml"],
    "mine.yaml": ["configs/digits.yaml"],
}
VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*=\S*")


@dataclass(frozen=True)
class Command:
    """A command of a document.

    Attributes:
        document: file name.
        line: where it begins, from 1.
        text: in one line, without comment and without the folder of the virtual environment.
    """

    document: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {self.text}"

    def words(self, stand_ins: Mapping[str, str] = MappingProxyType({})) -> list[str]:
        """The words that the program gets, itself first; variables of the environment left out.

        ``stand_ins``: words of the document, and those that are taken in their place.
        """
        words = shlex.split(self.text)
        while words and VARIABLE.fullmatch(words[0]):
            words = words[1:]
        known = PLACEHOLDERS | {word: [value] for word, value in stand_ins.items()}
        return [value for word in words for value in known.get(word, [word])]


def code_blocks(text: str) -> Iterator[tuple[int, str]]:
    """(number of the first line, text) of the fenced and the indented blocks that are no Python."""
    lines = text.splitlines()
    start = None
    fence = None
    for number, line in enumerate([*lines, ""], start=1):
        stripped = line.strip()
        if fence is not None:
            if stripped == "```":
                if fence in ("", "sh", "bash", "console", "shell"):
                    yield start, "\n".join(lines[start - 1 : number - 1])
                fence = None
            continue
        if stripped.startswith("```"):
            fence = stripped[3:].strip()
            start = number + 1
            continue
        # an indented line after a paragraph belongs to a list
        if line.startswith("    "):
            yield number, line


def in_backticks(text: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of every code span outside of the blocks; a span may go over a line end."""
    prose = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL)
    prose = re.sub(r"^    .*$", "", prose, flags=re.MULTILINE)
    for span in re.finditer(r"`([^`]+)`", prose):
        yield prose[: span.start()].count("\n") + 1, " ".join(span[1].split())


def shown_commands(text: str) -> Iterator[tuple[int, str]]:
    """(line number, command) of every command of a document, continued lines joined."""
    pending = None
    found = []
    for first, block in code_blocks(text):
        for number, line in enumerate(block.splitlines(), start=first):
            if pending is None:
                pending = (number, "")
            pending = (pending[0], f"{pending[1]} {line.strip()}")
            if line.rstrip().endswith("\\"):
                pending = (pending[0], pending[1].rstrip("\\ "))
                continue
            found.append(pending)
            pending = None
    found += in_backticks(text)
    for number, line in sorted(found, key=lambda item: item[0]):
        for part in without_comment(line).split(" && "):
            command = " ".join(part.replace("$ ", "", 1).split()).replace(".venv/bin/", "")
            words = [word for word in command.split() if not VARIABLE.fullmatch(word)]
            # a program's name alone is prose
            if len(words) > 1 and words[0] in PROGRAMS:
                yield number, command


def without_comment(line: str) -> str:
    """The line up to a `#` that begins a word outside of quotes."""
    quote = None
    for i, letter in enumerate(line):
        if quote:
            quote = None if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (i == 0 or line[i - 1].isspace()):
            return line[:i]
    return line


def commands_of(document: Path) -> list[Command]:
    text = document.read_text()
    return [Command(document.name, number, found) for number, found in shown_commands(text)]


# parsing


class Stopped(BaseException):
    """A program has come to its parser, and goes no further."""


@contextmanager
def _stopped_by(at_parser: Callable, program: str, args: list[str]) -> Iterator[io.StringIO]:
    """Inside, a parser's ``parse_args`` is ``at_parser(original)``; yields what the program says."""
    said = io.StringIO()
    with ExitStack() as stack:
        for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
            stack.enter_context(patch.object(kind, "parse_args", at_parser(kind.parse_args)))
        stack.enter_context(patch.object(sys, "argv", [program, *args]))
        stack.enter_context(redirect_stdout(said))
        stack.enter_context(redirect_stderr(said))
        yield said


def _stop_after(parse_args: Callable) -> Callable:
    def wrapped(*args, **options):
        raise Stopped(parse_args(*args, **options))

    return wrapped


def _stop_before(parse_args: Callable) -> Callable:
    def wrapped(parser, *args, **options):
        raise Stopped(parser)

    return wrapped


def has_parser(module: str) -> bool:
    """Whether the module's ``main`` reads arguments; one without a parser would do its work."""
    source = inspect.getsource(import_module(module).main)
    return re.search(r"parse|argv", source) is not None


def parse_main(module: str, program: str, args: list[str]) -> None:
    """Let ``module.main()`` parse the arguments with its own parser, and stop it there.

    Raises:
        ValueError: it refuses them, or takes none.
    """
    if not has_parser(module):
        if args:
            raise ValueError(f"{module} takes no arguments, got {args}")
        return
    loaded = import_module(module)
    # a function that only parses also checks what argparse leaves to it
    only_parses = getattr(loaded, "parse", None)
    at_parser = _stop_after if only_parses is None else (lambda parse_args: parse_args)
    with _stopped_by(at_parser, program, args) as said:
        try:
            if only_parses is not None:
                only_parses(args)
                return
            loaded.main()
        except Stopped:
            return
        except SystemExit as error:
            # --help ends a program too
            if error.code:
                raise ValueError(f"{module} refuses {args}: {said.getvalue()[-600:]}") from None
            return
    if args != ["--help"]:
        raise ValueError(f"{module} has parsed nothing of {args}")


def options_of(module: str) -> set[str]:
    """The options of ``module.main()``, as its own parser has them."""
    with _stopped_by(_stop_before, module, []):
        try:
            import_module(module).main()
        except Stopped as stopped:
            (parser,) = stopped.args
            return {name for action in parser._actions for name in action.option_strings}
    raise ValueError(f"{module} has no parser")


def named_options(text: str) -> Iterator[tuple[int, str]]:
    """(line number, option) of the options that a document names in backticks."""
    for number, span in in_backticks(text):
        if span.startswith("--"):
            for option in re.findall(r"(?:^|\s)(--[\w.-]+)", span):
                yield number, option


def parse_script(path: str, args: list[str]) -> None:
    """Parse the arguments of a script of the checkout.

    Raises:
        ValueError: there is no such script, or it refuses the arguments.
    """
    file = ROOT / path
    if not file.is_file():
        raise ValueError(f"expected a script of the checkout, got {path}")
    if file.parent == ROOT / "sra_fast":
        parse_main(f"sra_fast.{file.stem}", file.name, args)
    elif args and not re.search(r"parse|argv", file.read_text()):
        raise ValueError(f"{path} takes no arguments, got {args}")


def parse_python(args: list[str]) -> None:
    if args[0] == "-c":
        compile(args[1], "-c", "exec")
    elif args[:2] == ["-m", "pytest"]:
        parse_pytest(args[2:])
    elif args[0] == "-m":
        parse_main(args[1], args[1], args[2:])
    else:
        parse_script(args[0], args[1:])


def parse_pytest(args: list[str]) -> None:
    """``pytest``: the tests that are named exist. Its own options are not read."""
    for arg in args:
        path, _, test = arg.partition("::")
        if "/" in path and not (ROOT / path).exists():
            raise ValueError(f"expected tests of the checkout, got {path}")
        if test and f"def {test}(" not in (ROOT / path).read_text():
            raise ValueError(f"{path} has no {test}")


def parse_deepspeed(args: list[str]) -> None:
    from deepspeed.launcher.runner import parse_args

    parsed = parse_args(args)
    parse_script(parsed.user_script, parsed.user_args)


def parse_torchrun(args: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(args)
    parse_script(parsed.training_script, parsed.training_script_args)


def parse_accelerate(args: list[str]) -> None:
    """``accelerate launch``, whose options stand before the script."""
    from accelerate.commands.launch import launch_command_parser

    if args[0] != "launch":
        raise ValueError(f"expected accelerate launch, got {args}")
    parsed = launch_command_parser().parse_args(args[1:])
    parse_script(parsed.training_script, parsed.training_script_args)


def parse_make(args: list[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    unknown = [arg for arg in args if "=" not in arg and arg not in targets]
    if unknown:
        raise ValueError(f"the Makefile has no target {unknown}")


def extras() -> set[str]:
    """The extras of setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS":
            names |= {key.value for key in node.value.keys}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("EXTRAS["):
            names.add(node.targets[0].slice.value)
    return names


def parse_pip(args: list[str]) -> None:
    """``pip install`` with the options that the documents use, and extras that setup.py has."""
    parser = argparse.ArgumentParser("pip", exit_on_error=False)
    parser.add_argument("command", choices=["install"])
    parser.add_argument("-c", dest="constraints")
    parser.add_argument("-e", dest="editable", action="append", default=[])
    parser.add_argument("--no-build-isolation", action="store_true")
    parser.add_argument("--index-url")
    parser.add_argument("packages", nargs="*")
    parsed, unknown = parser.parse_known_intermixed_args(args)
    if unknown:
        raise ValueError(f"options of pip that no document had: {unknown}")
    if parsed.constraints and not (ROOT / parsed.constraints).is_file():
        raise ValueError(f"expected a file of the checkout, got {parsed.constraints}")
    for package in [*parsed.packages, *parsed.editable]:
        asked = re.fullmatch(r"(?:\.|sra-fast)\[(.+)\]", package)
        unknown = set(asked[1].split(",")) - extras() if asked else set()
        if unknown:
            raise ValueError(f"setup.py has no extra {sorted(unknown)}")


PARSERS = {
    "accelerate": parse_accelerate,
    "deepspeed": parse_deepspeed,
    "make": parse_make,
    "pip": parse_pip,
    "pytest": parse_pytest,
    "python": parse_python,
    "python3": parse_python,
    "sra-fast": lambda args: parse_main("sra_fast.__main__", "sra-fast", args),
    "torchrun": parse_torchrun,
}


def parse(command: Command) -> None:
    """Let the program that the command names parse it.

    Raises:
        ValueError: the program, or one that it starts, refuses the arguments.
    """
    program, *args = command.words()
    try:
        PARSERS[program](args)
    except SystemExit as error:
        raise ValueError(f"{program} refuses {args}, exit code {error.code}") from None


# execution


def make_workspace(folder: Path) -> Path:
    """A folder in which the documents' commands run as in a checkout, and leave nothing in it."""
    for name in ("benchmarks", "configs", "examples", "kernels", "sra_fast"):
        (folder / name).symlink_to(ROOT / name)
    # what docs/your_own_images.md and README.md begin with
    write_images(folder / "my_images", per_class=8)
    write_foreign_files(folder)
    return folder


def write_foreign_files(folder: Path) -> None:
    """Small files under the names of those that a reader gets from elsewhere."""
    # an official release has twice as many output channels as its input, as DiT, and no head; a SiT
    # has zeros in the half that it does not use
    sit = network(DiT)
    for parameter in (sit.final_layer.linear.weight, sit.final_layer.linear.bias):
        parameter.data.unflatten(0, (-1, 2 * sit.in_channels))[:, sit.in_channels :] = 0
    releases = {
        "SiT-XL-2-256x256.pt": sit,
        "DiT-XL-2-256x256.pt": network(DiT, in_channels=4, num_classes=5),
    }
    for name, model in releases.items():
        torch.save(weights(model, without=("ap_head",)), folder / name)
    write_vae(folder / "vae")
    (folder / "real_images").mkdir()
    for i, image in enumerate(to_uint8(Digits().images[:100])):
        Image.fromarray(image[..., 0]).save(folder / f"real_images/{i:03d}.png")
    (folder / "my_features.py").write_text("def extract(x):\n    return x.flatten(1).float()\n")


def execute(
    command: Command, workspace: Path, more: list[str], stand_ins: Mapping[str, str]
) -> Result:
    """Run the command with further arguments: under a launcher in processes, else in this one.

    ``stand_ins``: words of the document, and those of the workspace in their place.
    """
    # a program may add the working directory, and import a module of a reader from it
    with patch.object(sys, "path", [*sys.path]):
        return _execute(command, workspace, [*command.words(stand_ins), *more])


def _execute(command: Command, workspace: Path, words: list[str]) -> Result:
    program, *args = words
    if program == "sra-fast":
        return call_console(*args, cwd=workspace)
    if program == "deepspeed":
        # one process on any machine: DeepSpeed counts the sockets of a CPU
        launcher = ("-m", "deepspeed.launcher.runner", "--num_accelerators", 1)
        port = ("--master_port", free_port())
        return run_python(*launcher, *port, *args, cwd=workspace)
    if program == "python" and args[0].startswith("sra_fast/"):
        return call(Path(args[0]).stem, *args[1:], cwd=workspace)
    if program == "python":
        return run_python(*args, cwd=workspace)
    raise ValueError(f"expected a program that can be executed, got {command}")
