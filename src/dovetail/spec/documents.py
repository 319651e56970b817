"""YAML as people mean it, for specs, recipes and values on a command line."""

from __future__ import annotations

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number and 1:3 as text, as YAML 1.2 does; PyYAML wants 3.0e-4, and 63 of base 60."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Raises Twice for a key that stands twice, of which PyYAML takes the last. (Here merges, <<, which a key may
        well override, are not yet in.)"""
        node: Any = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise Twice(key.value, key.start_mark.line + 1)
                seen.add((key.tag, key.value))
        return node


class Twice(yaml.YAMLError):
    """A key that stands twice in one mapping, and the line of the second."""

    def __init__(self, key: str, line: int):
        super().__init__(f"the key {key!r} stands twice (line {line})")
        self.key, self.line = key, line


def _without_base_60(tag: str, form: re.Pattern[str]) -> tuple[str, re.Pattern[str]]:
    """A slice of layers would be the number of one."""
    number = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    return tag, re.compile("(?!.*:)" + form.pattern, form.flags) if number else form


Loader.yaml_implicit_resolvers = {
    first: [_without_base_60(*known) for known in forms]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
