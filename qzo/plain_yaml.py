"""Plain YAML: null, true and false, numbers, texts, lists and mappings; no anchors, no tags.

YAML 1.1, PyYAML's language, reads yes, no, on and off as booleans, 1:30 and 010 as other numbers, and 1e-6 as a text.
Here only true and false are booleans, and numbers are what they look like.
"""

import re
from typing import Any

import yaml

_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]{1,400}",
    "float": r"[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class NotPlainYaml(ValueError):
    """The text cannot be read; `line` counts from 1 (None: not known)."""

    def __init__(self, problem: str, line: int | None):
        super().__init__(problem)
        self.line = line


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}

    def __init__(self, text: str):
        super().__init__(text)
        self.repeated: list[tuple[str, int]] = []

    def compose_node(self, parent, index):
        event = self.peek_event()
        if event.anchor is not None or getattr(event, "tag", None) is not None:
            problem = "anchors, aliases and tags are not read"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        earlier = set()
        for key in keys:
            if key.value in earlier:
                self.repeated.append((key.value, key.start_mark.line + 1))
            earlier.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True

    def represent_str(self, data):
        # PyYAML writes these line breaks as they are unless the text is double-quoted, and then reads another text.
        style = '"' if {"\x85", "\u2028", "\u2029"} & set(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


for _name, _pattern in _SCALARS.items():
    _expression = re.compile(rf"(?:{_pattern})\Z")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _expression, None)
    # On top of YAML 1.1's own, so that a text which either language takes for something else is quoted.
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _expression, None)
_Dumper.add_representer(str, _Dumper.represent_str)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def parse(text: str) -> tuple[Any, list[tuple[str, int]]]:
    """The value of one document, and the keys that appear a second time in their mapping, each with its line.

    Raises NotPlainYaml.
    """
    try:
        loader = _Loader(text)
        return loader.get_single_data(), loader.repeated
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise NotPlainYaml(error.problem or str(error), mark.line + 1 if mark else None) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise NotPlainYaml(f"the character {chr(error.character)!r} is not allowed", line) from error
    except RecursionError as error:
        raise NotPlainYaml("nested too deeply", None) from error


def dump(value: Any) -> str:
    """Text that `parse` and every YAML 1.1 reader take for the same value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
