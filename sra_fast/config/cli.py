"""YAML files and command line to dataclasses."""

import sys
from dataclasses import asdict
from pathlib import Path

import jsonargparse
import yaml

from sra_fast.config.schema import Config

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def _load(text: str):
    """jsonargparse's YAML, with ``align: none`` as a short form of ``align: {target: none}``."""
    value = jsonargparse.get_loader("yaml")(text)
    if isinstance(value, dict) and value.get("align") == "none":
        value["align"] = {"target": "none"}
    return value


jsonargparse.set_loader("sra", _load, exceptions=(yaml.YAMLError,))


def make_parser(options: type, description: str) -> jsonargparse.ArgumentParser:
    """A parser with ``--config`` (repeatable, later files win), the fields of ``options`` and ``--print_config``."""
    parser = jsonargparse.ArgumentParser(
        description=description,
        usage="%(prog)s --config FILE.yaml [--section.field VALUE ...]",
        parser_mode="sra",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="config", help="YAML file; may be given several times, the last one wins"
    )
    parser.add_class_arguments(options)
    return parser


def parse(options: type, parser: jsonargparse.ArgumentParser, args: list[str] | None = None):
    """``(options instance, everything parsed)``; a typo or a wrong type ends the process with one message, exit code 2."""
    parsed = parser.instantiate(parser.parse_args(args))
    return options(**{name: getattr(parsed, name) for name in options.__dataclass_fields__}), parsed


def parse_train(args: list[str] | None = None) -> tuple[Config, str | None]:
    """Training configuration and the path of DeepSpeed's JSON (or None)."""
    parser = make_parser(Config, "Train SiT or DiT with SRA under DeepSpeed ZeRO.")
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
    args = list(sys.argv[1:] if args is None else args)
    for i, arg in enumerate(args):  # the same short form as in a file
        if arg == "--align=none" or args[i : i + 2] == ["--align", "none"]:
            args[i] = arg.replace("--align", "--align.target")
    cfg, parsed = parse(Config, parser, args)
    return cfg, parsed.deepspeed_config


def _plain(value):
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def save_config(cfg: Config, path: Path) -> None:
    """The resolved configuration as YAML, readable by ``--config``."""
    path.write_text(yaml.safe_dump(_plain(asdict(cfg)), sort_keys=False))


def load_config(path: Path) -> Config:
    """A configuration written by ``save_config``."""
    return parse_train(["--config", str(path)])[0]
