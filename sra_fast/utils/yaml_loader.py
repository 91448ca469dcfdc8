"""How configurations and studies are read and written: YAML without the traps of YAML 1.1."""

import re
from collections.abc import Hashable

import yaml

MERGE = "tag:yaml.org,2002:merge"
PREFIX = "tag:yaml.org,2002:"
# kind of a value -> how it is written, and the characters that it may begin with
SCALARS = {
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class KeysOnce:
    """Part of a YAML loader that refuses a key that is there twice: the first one would be lost."""

    def flatten_mapping(self, node):
        # called before every mapping is made or merged; what is merged by now is no key of its own
        checked = self.__dict__.setdefault("checked", set())
        if node not in checked:
            checked.add(node)
            self._check_keys(node)
        super().flatten_mapping(node)

    def _check_keys(self, node):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is there twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)


class ConfigLoader(KeysOnce, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Numbers and booleans as in YAML 1.2: ``1e-4`` is a number, ``010`` no octal one, ``no`` no
    boolean, ``1:30`` no number of base 60 and ``2026-11-29`` no date.
    """

    # without those that YAML 1.2 has otherwise; SCALARS takes their place
    yaml_implicit_resolvers = {
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.removeprefix(PREFIX) not in (*SCALARS, "timestamp")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _kind, (_pattern, _first) in SCALARS.items():
    ConfigLoader.add_implicit_resolver(
        PREFIX + _kind, re.compile(f"^(?:{_pattern})$"), list(_first)
    )


class ConfigDumper(yaml.SafeDumper):
    """Quotes every text that ``ConfigLoader`` would read as something else, such as ``1e-3``, and
    those that only YAML 1.1 would, such as ``no``: other programs read the file, too.
    """

    yaml_implicit_resolvers = {
        first: [*resolvers, *ConfigLoader.yaml_implicit_resolvers.get(first, ())]
        for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


def write_config(value, **style) -> str:
    """The YAML text that ``read_config`` reads back as ``value``.

    Args:
        value: of mappings, lists, texts, numbers, booleans and None.
        style: options of ``yaml.dump``.
    """
    return yaml.dump(value, Dumper=ConfigDumper, sort_keys=False, **style)


def read_config(text: str):
    """The value of a YAML text, as the options of a program are written.

    Raises:
        yaml.YAMLError: it is none, or has a key twice.
    """
    value = yaml.load(text, ConfigLoader)
    # a text such as `{a}` or `a:` is no mapping to nothing, but a text; `a: null` is one
    if isinstance(value, dict) and value and all(item is None for item in value.values()):
        words = text.strip(" \n{}:").replace(" ", "").split(",")
        if {*words} == {str(key).replace(" ", "") for key in value}:
            return text
    return value
