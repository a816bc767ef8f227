"""The deployment files as values, and their validation by the real schemas.

Unknown fields are refused. The schemas of KubeRay and compose are in tests/data/schemas; those of
AWS are Ray's launcher's, and EC2's for the parts that the launcher forwards. No document reaches a
server, so rules that only an API server evaluates, and whether an image exists, are not tested.
"""

import copy
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import yaml
from botocore.validate import ParamValidator

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "cluster" / "deploy"
FILES = ("compose.yaml", "kuberay-job.yaml", "kuberay-cluster.yaml", "ray-aws.yaml")
KUBERAY = ("kuberay-job.yaml", "kuberay-cluster.yaml")
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
DOC = (ROOT / "docs" / "deploy.md").read_text()
_NAMED_SECRET = re.compile(r"PASSWORD$|SECRET|TOKEN$|_KEY$|ACCESS_KEY")  # of variables
_LOOKS_SECRET = re.compile(r"://[^/\s:@]*:[^/\s@]+@|(AKIA|ASIA)[A-Z0-9]{16}")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


COMPOSE = documents("compose.yaml")[0]
AWS = documents("ray-aws.yaml")[0]


def closed(schema: Any) -> Any:
    """Returns a Kubernetes schema that refuses unknown fields, as strict validation does."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string") is True:
        made = {"type": ["integer", "string"]} | (
            {"pattern": made["pattern"]} if "pattern" in made else {}
        )
    if isinstance(made.get("properties"), dict) and not made.get(
        "x-kubernetes-preserve-unknown-fields"
    ):
        made.setdefault("additionalProperties", False)
    return made


@functools.cache
def schema(name: str) -> Any:
    return json.loads((ROOT / "tests" / "data" / "schemas" / f"{name}.json").read_text())


@functools.cache
def kubernetes_schema(kind: str) -> Any:
    """Returns the schema of RayJob, RayCluster or NetworkPolicy.

    KubeRay's schema has the parts of the last one.
    """
    cluster = closed(schema("raycluster"))
    spec = cluster["properties"]["spec"]["properties"]
    metadata = spec["headGroupSpec"]["properties"]["template"]["properties"]["metadata"]
    if kind == "NetworkPolicy":
        rules = spec["networkPolicy"]["properties"]["head"]["properties"]
        selector = rules["ingressRules"]["items"]["properties"]["from"]["items"]["properties"][
            "podSelector"
        ]
        types = {"type": "array", "items": {"enum": ["Ingress", "Egress"]}}
        policy = {"podSelector": selector, "policyTypes": types}
        policy |= {"ingress": rules["ingressRules"], "egress": rules["egressRules"]}
        made = closed(
            {"type": "object", "properties": {"spec": {"type": "object", "properties": policy}}}
        )
    else:
        made = closed(schema("rayjob")) if kind == "RayJob" else cluster
    version = "networking.k8s.io/v1" if kind == "NetworkPolicy" else "ray.io/v1"
    names = {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": metadata}
    return made | {
        "properties": made["properties"] | names,
        "required": ["apiVersion", "kind", "metadata", "spec"],
    }


def problems(file: str, index: int, document: Any) -> list[str]:
    """Returns the errors of a file's document under its schema."""
    if file == "ray-aws.yaml":
        return aws_problems(document)
    if file == "compose.yaml":
        validator: Any = jsonschema.Draft7Validator(schema("compose"))
    else:
        validator = jsonschema.Draft202012Validator(
            kubernetes_schema(documents(file)[index]["kind"])
        )
    return [
        f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(document)
    ]


@functools.cache
def run_instances() -> Any:
    """Returns EC2's model of the request that Ray's launcher makes from `node_config`."""
    return (
        botocore.session.get_session()
        .get_service_model("ec2")
        .operation_model("RunInstances")
        .input_shape
    )


def aws_problems(document: Any) -> list[str]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(copy.deepcopy(document)))
    except jsonschema.ValidationError as error:
        return [f"{error.json_path}: {error.message[:200]}"]
    nodes = document["available_node_types"].items()
    counts = {"MinCount": 1, "MaxCount": 1}
    reports = {
        kind: ParamValidator().validate(node["node_config"] | counts, run_instances())
        for kind, node in nodes
    }
    return [
        f"{kind}: {report.generate_report()}"
        for kind, report in reports.items()
        if report.has_errors()
    ]


def changed(document: Any, path: str, value: Any) -> Any:
    """Returns a copy with another value at a dotted path.

    `old>new` as the last part of the path renames a field.
    """
    made = copy.deepcopy(document)
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    place = made
    for part in parents:
        place = place[part]
    old, _, new = str(last).partition(">")
    place[new or last] = place.pop(old) if new else value
    return made


def scalars(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields every value of a document with its name, which lists of {name, value} give."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from scalars(
                inner, str(value["name"]) if key == "value" and "name" in value else str(key)
            )
    elif isinstance(value, list):
        for inner in value:
            yield from scalars(inner, name)
    else:
        yield name, str(value)


def literal_secrets(document: Any) -> list[str]:
    """Returns the names of values that are or contain a secret not taken from the environment."""
    plain = [(name, re.sub(r"\$\{[^}]*\}", "", value)) for name, value in scalars(document)]
    named = [name for name, value in plain if _NAMED_SECRET.search(name) and value.strip('",')]
    return named + [name for name, value in plain if _LOOKS_SECRET.search(value)]


def pods(file: str) -> dict[str, dict[str, Any]]:
    """Returns the pod specs of head and worker."""
    spec = documents(file)[0]["spec"]
    ray_spec = spec.get("rayClusterSpec", spec)
    (workers,) = ray_spec["workerGroupSpecs"]
    return {
        "head": ray_spec["headGroupSpec"]["template"]["spec"],
        "worker": workers["template"]["spec"],
    }


def image_variables() -> dict[str, str]:
    """Returns the environment variables that the image sets."""
    return dict(re.findall(r"^(?:ENV|   ) +(\w+)=(\S+)", DOCKERFILE, re.M))
