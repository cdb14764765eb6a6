"""PyYAML's safe loader for files of strangers: what has two meanings is refused, and nothing takes memory without end.

PyYAML reads YAML 1.1. Departures from yaml.safe_load: 6e-4 is a number (there it is text), dates and a lone `=` are
text (there they are values of their own kind), no tags but those of plain values, lists and tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from megatron.text import shortened

MAX_BYTES = 2**22
MAX_DEPTH = 32
MAX_NODES = 20_000
"""Values of a file, those behind an alias counted wherever it stands."""
MAX_DIGITS = 19

_TAG = "tag:yaml.org,2002:"
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_CLOCK = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Loader(yaml.SafeLoader):
    """Builds the values of a file that compose() has looked through."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """PyYAML's, which calls itself for each level, with an end to that."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _fault(f"nested more than {MAX_DEPTH} levels deep", self.peek_event().start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """PyYAML's, whose other errors (a tag that does not fit its value) become YAML errors."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, OverflowError, TypeError, AttributeError) as error:
            raise _fault(f"'{shortened(node.value)}' is not a value of its tag ({error})", node.start_mark) from None

    def construct_text(self, node: yaml.Node) -> str:
        """A text; the two halves of a character that JSON escapes as a pair become one."""
        text = str(self.construct_scalar(node))  # type: ignore[arg-type]
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _resolvers() -> dict[Any, list[Any]]:
    left_out = (f"{_TAG}timestamp", f"{_TAG}value")
    inherited = yaml.SafeLoader.yaml_implicit_resolvers.items()
    return {first: [pair for pair in pairs if pair[0] not in left_out] for first, pairs in inherited}


Loader.yaml_implicit_resolvers = _resolvers()
Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$|^[-+]?\.[0-9_]+[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
Loader.yaml_constructors = {
    tag: function
    for tag, function in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_TAG) in ("null", "bool", "int", "float", "str", "seq", "map")
}
Loader.add_constructor(f"{_TAG}str", Loader.construct_text)


def compose(text: str) -> tuple[Loader, yaml.Node | None]:
    """The nodes of a YAML text and the loader that constructs them; raises yaml.YAMLError, for too large ones, too."""
    loader = Loader(text)
    try:
        node = loader.get_single_node()
    except (ValueError, OverflowError):  # "\\U99999999"
        raise _fault("no character has the number of this escape", loader.get_mark()) from None
    if node is not None:
        _measure(node, {})
    return loader, node


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(values, levels) of a node, aliases counted as what they stand for; raises yaml.YAMLError when too many."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 1
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise _fault("an alias stands inside the value that it stands for", node.start_mark)
        return found
    known[id(node)] = None
    values, levels = 1, 0
    for child in _children(node):
        more, below = _measure(child, known)
        values, levels = values + more, max(levels, below)
    if values > MAX_NODES:
        raise _fault(f"more than {MAX_NODES:,} values (aliases count as what they stand for)", node.start_mark)
    if levels >= MAX_DEPTH:
        raise _fault(f"nested more than {MAX_DEPTH} levels deep", node.start_mark)
    known[id(node)] = values, levels + 1
    return values, levels + 1


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    for item in node.value:
        yield from item if isinstance(item, tuple) else (item,)


def ambiguities(node: yaml.Node) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of each plain value in a node that has two readings, or that no number here can hold."""
    if not isinstance(node, yaml.ScalarNode):
        for child in _children(node):
            yield from ambiguities(child)
    elif (found := _ambiguity(node)) is not None:
        yield node.start_mark.line + 1, found


def _ambiguity(node: yaml.ScalarNode) -> str | None:
    text, shown = node.value, shortened(node.value)
    decimal, old = (_without_zeros(text), _as_octal(text)) if _OCTAL.fullmatch(text) else ("", "")
    if node.style is None and decimal != old:
        readings = f"{old} in YAML 1.1 (octal)" if old is not None else "text in YAML 1.1"
        number = f"{old} or {decimal}" if old is not None else decimal
        return f"{shown} is {readings} and {decimal} in YAML 1.2; write {number}, or '{shown}' in quotes for text"
    if node.style is None and _CLOCK.fullmatch(text):
        seconds = _as_seconds(text)
        return (
            f"{shown} is {seconds} in YAML 1.1 (base 60) and text in YAML 1.2; write {seconds}, or '{shown}' in quotes"
        )
    if node.tag == f"{_TAG}int" and not _fits(text):
        return f"{shown} is a whole number of more than 64 bits, which no key takes; give a smaller one"
    if node.tag == f"{_TAG}str" and _is_lone(text):
        return "holds half of a character (a lone surrogate); write the character itself"
    return None


def _fits(text: str) -> bool:
    digits = text.replace("_", "").lstrip("+-").lower()
    if digits.startswith(("0x", "0b")):
        return len(digits.removeprefix("0x").removeprefix("0b").lstrip("0")) <= (15 if "x" in digits else 63)
    return len(digits) <= MAX_DIGITS and (not digits.isdigit() or int(digits) < 2**63)


def _is_lone(text: str) -> bool:
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    return _SURROGATE.search(joined) is not None


def _without_zeros(text: str) -> str:
    sign = "-" if text.startswith("-") else ""
    return shortened(sign + (text.lstrip("+-").replace("_", "").lstrip("0") or "0"))


def _as_octal(text: str) -> str | None:
    """What PyYAML makes of it; None where it has an 8 or 9."""
    digits = text.lstrip("+-").replace("_", "")
    if set(digits) - set("01234567"):
        return None
    sign = "-" if text.startswith("-") else ""
    return f"{sign}{int(digits, 8)}" if len(digits) <= MAX_DIGITS else "a number"


def _as_seconds(text: str) -> str:
    whole, dot, fraction = text.lstrip("+-").replace("_", "").partition(".")
    if len(whole) > 3 * MAX_DIGITS:
        return "a number"
    total = 0
    for part in whole.split(":"):
        total = 60 * total + int(part)
    return f"{'-' if text.startswith('-') else ''}{total}{dot}{fraction}"


def line_of(error: yaml.YAMLError) -> int:
    """The line that a YAML error is about, from 1."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return mark.line + 1 if mark is not None else 1


def problem_of(error: yaml.YAMLError) -> str:
    """What a YAML error says is wrong."""
    return getattr(error, "problem", None) or str(error).splitlines()[0]


def _fault(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
