"""YAML files and command line to dataclasses.

The choices of a field come from a registry, so the rooms that register them must be imported before
a parser is built. The scripts do that.
"""

import argparse
import functools
import json
import sys
from contextlib import suppress
from dataclasses import asdict, field, fields, is_dataclass, make_dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_type_hints

import jsonargparse
import yaml

from sra_fast.config import lr_schedules  # noqa: F401 (registers them)
from sra_fast.config.arguments import import_parts_or_fail
from sra_fast.config.messages import Parser, config_files
from sra_fast.config.schema import AlignConfig, Config
from sra_fast.utils import registry
from sra_fast.utils.messages import warn
from sra_fast.utils.registry import MODEL_FAMILIES, TARGETS, Registry
from sra_fast.utils.yaml_loader import read_config, write_config

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


# the sections that have the options of an alignment target
SECTIONS = ("align", "align2")


# section -> the target of the command line that is being read
_chosen: dict[str, str] = {}


def _load(text: str):
    """The value of a YAML text, with ``align: NAME`` as a short form of ``align: {target: NAME}``,
    and without the options of targets that the command line replaces by others.
    """
    if text.startswith('["'):
        # what _with_lists has written: how JSON escapes an emoji is no YAML
        with suppress(ValueError):
            return json.loads(text)
    value = read_config(text)
    if not isinstance(value, dict):
        return value
    for section in SECTIONS:
        options = value.get(section)
        if isinstance(options, str):
            value[section] = {"target": options}
        elif isinstance(options, dict) and _is_replaced(section, options.get("target")):
            # lambda, layers and distance of one method are no choice for another
            value[section] = {}
    return value


def _is_replaced(section: str, target: str | None) -> bool:
    """Whether a file's target is another one than that of the command line."""
    return target in TARGETS and target not in ("none", _chosen.get(section, target))


# what users of other projects type -> the field
SHORT_FORMS = {
    "--model": "model.name",
    "--data": "data.path",
    "--align": "align.target",
    "--align2": "align2.target",
    "--cfg-scale": "sample.guidance",
}

# one loader for files and for values of the command line
jsonargparse.set_loader("sra", _load, exceptions=(yaml.YAMLError,))
# what --print_config prints can be given to --config
jsonargparse.set_dumper("sra", partial(write_config, allow_unicode=True))


def _offer_choices(options: type) -> None:
    """Give each field made by ``choice`` the type ``Literal`` of what is registered now, in nested
    dataclasses too.
    """
    # the annotations as types, also those that are written as strings
    hints = get_type_hints(options)
    for item in fields(options):
        parts: Registry | None = item.metadata.get("registry")
        if is_dataclass(hints[item.name]):
            _offer_choices(hints[item.name])
        elif parts is not None:
            names = [*item.metadata["more"], *parts]
            # an empty choice would refuse every value, and its message would not name the cause
            if len(names) == len(item.metadata["more"]):
                raise RuntimeError(
                    f"no {parts.kind} is registered: import the package that holds them "
                    "before the parser is built"
                )
            # jsonargparse may read the type from the field or from the constructor: change both
            item.type = Literal[tuple(names)]
            options.__init__.__annotations__[item.name] = item.type


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Prints the choices of an option once, after its name, and not as its type again."""

    def _get_type_str(self, action: argparse.Action) -> str | None:
        are_choices = str(action.metavar).startswith("{")
        return None if are_choices else super()._get_type_str(action)


class OptionsParser(Parser):
    """A parser of a dataclass's options, which reads them from files too."""

    def validate(self, namespace, skip_unset=True, **how):
        """Check all values, those that are None too: a file may have an empty one."""
        # first the options that were not given at all and have to be, whose message is another one
        super().validate(namespace, skip_unset, **how)
        # an option that may be None says so in its type
        super().validate(namespace, skip_unset=False, **how)


def make_parser(options: type, description: str) -> Parser:
    """A parser with ``--config`` (repeatable, later files win), the fields of ``options`` and
    ``--print_config``.
    """
    import_parts_or_fail()
    _offer_choices(options)
    parser = OptionsParser(
        description=description,
        usage="%(prog)s --config FILE.yaml [--section.field VALUE ...]",
        formatter_class=HelpFormatter,
        parser_mode="sra",
        # an abbreviation would turn some typos into other options
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file; may be given several times, the last one wins",
    )
    parser.add_class_arguments(options)
    _describe_names(options, parser)
    return parser


def _describe_names(options: type, parser: Parser) -> None:
    """What the help says of short forms, and of the names of models."""
    actions = parser._option_string_actions
    for name, hint in get_type_hints(options).items():
        # the parser's own form, a file for one section: --config does that too
        if is_dataclass(hint):
            actions[f"--{name}"].help = argparse.SUPPRESS
    for short, name in SHORT_FORMS.items():
        action = actions.get(f"--{name}")
        if action is None:
            continue
        if short not in actions:
            action.help = f"{action.help}; short form: {short}"
            continue
        value = "PATH" if name.endswith(".path") else "NAME"
        more = ""
        if name.endswith(".target"):
            more = f"; `{short} NAME --help` lists its options"
        actions[short].metavar = value
        actions[short].help = f"short for --{name} {value}{more}"
    if "--model.name" in actions:
        action = actions["--model.name"]
        action.help = f"{action.help}; families: {', '.join(MODEL_FAMILIES)}"


def parse(options: type, parser: Parser, args: list[str] | None = None):
    """``(options instance, everything parsed)``.

    A typo or a wrong type ends the process with one line and exit code 2.
    """
    parser.given = in_full(options, sys.argv[1:] if args is None else args)
    _check_files(options, parser)
    parsed = parser.parse_args(parser.given)
    # the parser lets a file give a section one value, and would fail with a TypeError below
    for name, hint in get_type_hints(options).items():
        section = getattr(parsed, name)
        if is_dataclass(hint) and not isinstance(section, jsonargparse.Namespace):
            parser.error(f"{name}: expected options below it, got {section!r}")
    parsed = parser.instantiate(parsed)
    values = {name: getattr(parsed, name) for name in options.__dataclass_fields__}
    return options(**values), parsed


def _check_files(options: type, parser: Parser) -> None:
    """Files that are no YAML, have an option twice, or no options by section, with their names: the
    parser's messages have none.
    """
    sections = [name for name, hint in get_type_hints(options).items() if is_dataclass(hint)]
    for file in config_files(parser.given):
        try:
            value = _load(file.read_text(encoding="utf-8"))
        except OSError as error:
            parser.error(f"{file} cannot be read: {error.strerror}")
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            problem = getattr(error, "problem", None) or " ".join(str(error).split())
            parser.error(f"{file}: {line}{problem}")
        if not isinstance(value, dict):
            parser.error(f"{file}: expected options by section, got {str(value or '')[:80]!r}")
        for name in sections:
            # a section may also be the name of another file
            if not isinstance(value.get(name, {}), dict | str):
                parser.error(f"{name} in {file}: expected options below it, got {value[name]!r}")


def parse_train(args: list[str] | None = None) -> tuple[Config, str | None]:
    """Training configuration and the path of DeepSpeed's JSON (or None)."""
    import_parts_or_fail()
    if not list(TARGETS):
        raise RuntimeError("no alignment target is registered: import sra_fast.alignment first")
    # the target has to be known first: the parser offers its options
    args = in_full(Config, sys.argv[1:] if args is None else args)
    _chosen.update({section: _target_of(section, args) for section in SECTIONS})
    options, parser = _train_parser(tuple(_chosen.items()), _registered(), sys.argv[0])
    cfg, parsed = parse(options, parser, args)
    # `options` was made for this parser: two of them never compare as equal
    cfg = Config(**{item.name: getattr(cfg, item.name) for item in fields(Config)})
    for section, name in _chosen.items():
        for file in config_files(args):
            found = _target_of_file(section, file)
            if _is_replaced(section, found):
                warn("%s: its options of %s are left out, the target is %s", file, found, name)
        if name == "none" and getattr(cfg, section) != AlignConfig(target="none"):
            parser.error(f"options of {section} are given, and {section}.target names no target")
    for section, align in cfg.alignments.items():
        # the parser has taken a target whose options it was not made for
        if not isinstance(align, TARGETS[align.target].config):
            parser.error(
                f"{section}.target {align.target} was expected to be named by an argument or by the "
                "file of its options"
            )
    return cfg, parsed.deepspeed_config


# what registries hold, and the names that it has there
Registered = tuple[tuple[tuple[str, object], ...], ...]


def _registered() -> Registered:
    """Everything that a parser may offer or read options of."""
    registries = [part for part in vars(registry).values() if isinstance(part, Registry)]
    return tuple(tuple(part.items()) for part in registries)


@functools.lru_cache(maxsize=32)
def _train_parser(
    chosen: tuple[tuple[str, str], ...], registered: Registered, program: str
) -> tuple[type[Config], Parser]:
    """The training options with those of the chosen targets, and their parser.

    Kept, because the descriptions of all options are read from their sources, which takes a tenth
    of a second. ``registered`` and ``program`` are what a parser depends on besides.
    """
    options = _with_targets(dict(chosen))
    parser = make_parser(options, "Train SiT, DiT or MMDiT with SRA under DeepSpeed ZeRO.")
    # DeepSpeed's launchers append these
    parser.add_argument(
        "--deepspeed",
        action="store_true",
        help="accepted for launch scripts; DeepSpeed always runs",
    )
    parser.add_argument(
        "--deepspeed_config",
        type=str | None,
        help="DeepSpeed JSON; wins over the defaults set here",
    )
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    return options, parser


def in_full(options: type, args: list[str]) -> list[str]:
    """The arguments with short forms written out, as far as ``options`` has what they stand for."""
    hints = get_type_hints(options)
    args = _with_lists(hints, _with_underscores(hints, args))
    full = list(args)
    for i, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if not equals:
            value = args[i + 1] if i + 1 < len(args) else ""
        section, _, name = SHORT_FORMS.get(option, "").partition(".")
        # `--model FILE.yaml` and `--model '{name: ...}'` are the parser's own forms of a section
        whole_section = option == f"--{section}" and value.endswith((".yaml", "}"))
        if section in hints and not whole_section:
            full[i] = f"--{section}.{name}{equals}{value if equals else ''}"
    return full


def _with_underscores(hints: dict, args: list[str]) -> list[str]:
    """The arguments with ``--text-name`` as ``--text_name``, where there is such an option."""
    full = []
    for arg in args:
        option, equals, value = arg.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        known = option.startswith("--") and name in hints
        full.append(f"--{name}{equals}{value}" if known else arg)
    return full


def _with_lists(hints: dict, args: list[str]) -> list[str]:
    """The arguments with each list of strings as one value: ``--captions a b`` becomes
    ``--captions ["a", "b"]``.
    """
    lists = {name for name, hint in hints.items() if hint in (list[str], list[str] | None)}
    full = []
    waiting = list(args)
    while waiting:
        arg = waiting.pop(0)
        option, equals, value = arg.partition("=")
        if not option.startswith("--") or option[2:] not in lists:
            full.append(arg)
            continue
        values = [value] if equals else []
        while not equals and waiting and not waiting[0].startswith("--"):
            values.append(waiting.pop(0))
        whole = len(values) == 1 and _is_list(values[0])
        full += [option, values[0] if whole else json.dumps(values)]
    return full


def _is_list(value: str) -> bool:
    """Whether a value is a list already, in the parser's own form; ``[1].json`` is a name."""
    try:
        return value.startswith("[") and isinstance(_load(value), list)
    except yaml.YAMLError:
        return False


def _target_of(section: str, args: list[str]) -> str:
    """The alignment target whose options the arguments may set in a section: the last one that they
    name.

    ``none`` only turns the alignment off. Options of the target stay valid.
    """
    # what a section has by default
    named = [AlignConfig.target] if section == "align" else []
    # in order: a later argument wins over an earlier one, as in the parser
    for i, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if not equals:
            value = args[i + 1] if i + 1 < len(args) else ""
        if option == f"--{section}.target":
            named.append(value)
        # a missing file is left to the parser, which has a message for it
        elif option == "--config" and Path(value).is_file():
            named.append(_target_of_file(section, Path(value)))
    # so is a name that nothing is registered under
    known = [name for name in named if name != "none" and name in TARGETS]
    return known[-1] if known else "none"


def _target_of_file(section: str, path: Path) -> str:
    """The alignment target whose options a section of a YAML file has; ``none`` where it names
    none.

    A file that turns the alignment off may still hold the options of a target, as the saved
    configuration of ``--align none`` does. Errors are left to the parser.
    """
    try:
        align = read_config(path.read_text())[section]
        align = {"target": align} if isinstance(align, str) else align
        # a file that names no target has options of the one that is chosen elsewhere
        name = str(align["target"])
        options = set(align)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return "none"
    if name == "none" and not options <= _option_names(AlignConfig):
        fitting = [
            other for other, part in TARGETS.items() if options <= _option_names(part.config)
        ]
        name = fitting[0] if fitting else "none"
    return name


def _option_names(config: type[AlignConfig]) -> set[str]:
    return {item.name for item in fields(config)}


def _with_targets(names: dict[str, str]) -> type[Config]:
    """``Config`` with the options of an alignment target in each of these sections."""
    sections = []
    for section, name in names.items():
        align = TARGETS[name].config
        # no other section than `align` has a target unless it is named
        default = align if section == "align" else partial(align, target="none")
        sections.append((section, align, field(default_factory=default)))
    # a subclass: the other sections keep their defaults and descriptions
    options = make_dataclass("Config", sections, bases=(Config,))
    # the help shows it
    options.__doc__ = Config.__doc__
    return options


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        # tuples become lists: the file has only one kind of sequence
        return [_plain(item) for item in value]
    return value


def save_config(cfg: Config, path: Path) -> None:
    """The resolved configuration as YAML, readable by ``--config``."""
    path.write_text(write_config(_plain(asdict(cfg))))
