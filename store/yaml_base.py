"""A YAML file that builds on another: ``base: other.yaml``, relative to it.

Mappings merge key by key, at every depth. Everything else (texts, numbers, whole lists) replaces what the base says.
``key: null`` takes the base's key away, so that its default holds.
"""

from __future__ import annotations

from typing import Any

import yaml

BASE = "base"


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return the mapping of a base with that of the file on top of it; the arguments stay as they are."""
    result = dict(below)
    for key, value in above.items():
        if value is None and key in result:
            del result[key]
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def merged_nodes(below: yaml.MappingNode, above: yaml.MappingNode) -> yaml.MappingNode:
    """Return the node tree of `merged`; each node keeps the mark (file and line) of the file that it stands in."""
    pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {key.value: (key, value) for key, value in below.value}
    for key, value in above.value:
        old = pairs.get(key.value, (None, None))[1]
        if old is not None and isinstance(value, yaml.ScalarNode) and value.tag == "tag:yaml.org,2002:null":
            del pairs[key.value]
        elif isinstance(value, yaml.MappingNode) and isinstance(old, yaml.MappingNode):
            pairs[key.value] = (key, merged_nodes(old, value))
        else:
            pairs[key.value] = (key, value)
    return yaml.MappingNode(above.tag, list(pairs.values()), above.start_mark, above.end_mark)
