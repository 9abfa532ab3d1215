"""YAML of plain values, from anyone: nothing in it runs, and nothing in it takes long.

Numbers are read as people write them (``1e-8`` is one, which YAML 1.1 calls a string); dates, binary and other tags are
refused, and so is what grows when it is read (anchors to themselves, or to more and more of the same).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import yaml
from yaml.constructor import ConstructorError

SIZE, NODES, DEPTH, DIGITS = 2**18, 20_000, 40, 40
"""Most bytes of a text, most values in it (with what anchors repeat), deepest nesting, most digits of a whole number."""
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)\Z")
_FLOAT = re.compile(
    r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(inf|Inf|INF))"
    r"\Z|\.(nan|NaN|NAN)\Z"
)
_TAG = "tag:yaml.org,2002:"
_OWN = ("int", "float", "timestamp")


def _resolvers(base: type[Any]) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    found = {
        first: [(tag, pattern) for tag, pattern in known if tag.removeprefix(_TAG) not in _OWN]
        for first, known in base.yaml_implicit_resolvers.items()
    }
    for first in "-+0123456789.":
        found.setdefault(first, [])
        found[first] += [(f"{_TAG}int", _INT), (f"{_TAG}float", _FLOAT)]
    return found


class _Loader(yaml.SafeLoader):
    """Plain values only; a key written twice is an error rather than a silent choice."""

    yaml_implicit_resolvers = _resolvers(yaml.SafeLoader)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        self._nodes += 1
        if self._depth > DEPTH or self._nodes > NODES:
            what = f"nested deeper than {DEPTH}" if self._depth > DEPTH else f"more than {NODES:,} values"
            raise ConstructorError(None, None, what, self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _count(node, {}, set())
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConstructorError(None, None, f"key {key!r:.80} is no name", key_node.start_mark)
            if key in seen:
                raise ConstructorError(
                    None, None, f"key '{key}' stands twice; expected once", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _count(node: Any, sizes: dict[int, int], above: set[int]) -> int:
    """How many values the node stands for, with what anchors repeat."""
    if id(node) in above:
        raise ConstructorError(None, None, "an anchor that holds itself", node.start_mark)
    if id(node) not in sizes:
        above.add(id(node))
        inner = node.value if isinstance(node.value, list) else []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        total = 1 + sum(_count(part, sizes, above) for part in parts)
        above.discard(id(node))
        if total > NODES:
            raise ConstructorError(None, None, f"more than {NODES:,} values, by its anchors", node.start_mark)
        sizes[id(node)] = total
    return sizes[id(node)]


def _int(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a whole number of more than {DIGITS} digits")
    plain = text.replace("_", "")
    return int(plain, 16 if "0x" in plain else 10)


def _float(text: str) -> float:
    return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))


def _scalar(read: Callable[[str], Any]) -> Callable[[_Loader, Any], Any]:
    def construct(loader: _Loader, node: Any) -> Any:
        try:
            return read(str(loader.construct_scalar(node)))
        except (ValueError, KeyError, OverflowError) as error:
            raise ConstructorError(None, None, f"{node.value[:40]!r}: {error}", node.start_mark) from None

    return construct


_Loader.yaml_constructors = {
    **{
        tag: known
        for tag, known in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("null", "str", "seq", "map")
    },
    f"{_TAG}bool": _scalar(lambda text: yaml.SafeLoader.bool_values[text.lower()]),
    f"{_TAG}int": _scalar(_int),
    f"{_TAG}float": _scalar(_float),
}


def load(text: str) -> Any:
    """Plain values from YAML; yaml.YAMLError, with the place, for anything else."""
    if len(text) > SIZE:
        raise ConstructorError(None, None, f"{len(text):,} characters, expected at most {SIZE:,}", None)
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


class _Dumper(yaml.SafeDumper):
    """Quotes what ``load`` would otherwise read as a number."""

    yaml_implicit_resolvers = _resolvers(yaml.SafeDumper)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> Any:
    """Quoted where it holds one of the line ends that PyYAML writes as they are, and reads as others."""
    odd = any(character in text for character in "\x85\u2028\u2029\ufeff")
    return dumper.represent_scalar(f"{_TAG}str", text, style='"' if odd else None)


_Dumper.add_representer(str, _text)


def dump(content: Mapping[str, Any]) -> str:
    """Plain values as YAML that ``load`` reads back as they are, in the given order."""
    return str(yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True))
