"""Makes the schemas of this folder from the files they come from; NOTICE says which.

    python tests/schemas/prune.py ray.io_rayjobs.yaml > tests/schemas/rayjob.json
    python tests/schemas/prune.py compose-spec.json > tests/schemas/compose.json

Of a CustomResourceDefinition it takes the schema of version v1. It drops what does not validate.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

_DROPPED = {"description", "default", "format", "example", "examples", "deprecated"}
_KEPT = {"x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields"}
_NAMED = {"properties", "patternProperties", "definitions"}  # below these, a key is the name of a field


def prune(schema: Any) -> Any:
    """The schema without what is there for people and for the API server."""
    if isinstance(schema, list):
        return [prune(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: prune(part) for name, part in value.items()} if key in _NAMED else prune(value)
        for key, value in schema.items()
        if key not in _DROPPED and (key in _KEPT or not key.startswith("x-kubernetes-"))
    }


if __name__ == "__main__":
    source = yaml.safe_load(Path(sys.argv[1]).read_text())
    if source.get("kind") == "CustomResourceDefinition":
        (source,) = (v["schema"]["openAPIV3Schema"] for v in source["spec"]["versions"] if v["name"] == "v1")
    print(json.dumps(prune(source), separators=(",", ":"), sort_keys=True))
