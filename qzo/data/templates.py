"""Templates "{field} ..." over the fields of a record; nothing but a field's text can be reached from one."""

from collections.abc import Callable
from string import Formatter

from qzo.errors import BadInput


class RecordError(ValueError):
    """What is wrong with one record; the reader, who knows the file and the line, turns it into a BadInput."""

    def __init__(self, given: str, expected: str = ""):
        super().__init__(given)
        self.given, self.expected = given, expected


def field(record: dict, name: str) -> object:
    """The value of a field; RecordError names the fields that are present."""
    if name not in record:
        raise RecordError(f"no field {name!r}", "one of its fields: " + ", ".join(map(str, record)))
    return record[name]


def text(record: dict, name: str) -> str:
    """The field as text; a number is written out, anything else is a RecordError."""
    value = field(record, name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RecordError(f"field {name!r} is {type(value).__name__}", "text or a number")
    return str(value)


def compile_template(template: str, where: str) -> Callable[[dict], str]:
    """A function record -> text for "{field} ..." ({{ and }} are braces).

    Only plain field names: an attribute, index, conversion, format spec or empty name is a BadInput at `where`.
    """
    do = "Write {{ and }} for literal braces."
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise BadInput(where, f"{template!r} ({error})", "a template such as '{sentence} It was'", do) from None
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not name.strip() or set(name) & set(".[]{}")):
            raise BadInput(where, f"{template!r}", "plain field names in braces", do)

    def render(record: dict) -> str:
        return "".join(literal + ("" if name is None else text(record, name)) for literal, name, _, _ in parts)

    return render
