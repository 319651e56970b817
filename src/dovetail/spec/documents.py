"""YAML as people mean it, for specs, recipes and values on a command line."""

from __future__ import annotations

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number, as YAML 1.2 does; PyYAML wants 3.0e-4."""

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


Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
