"""The deployment files fit their real schemas, and what they say fits this checkout."""

import re
import shlex
import socket
import subprocess
import sys

import pytest
import ray

from cluster.drain import _drain
from cluster.submit.checkout import uploaded_files
from cluster.submit.environment import job_spec
from hemoco.config import ResourcesConfig
from jobs.cli import _VERBS
from jobs.options import ReportOptions, typed_options
from tests.helpers.deploy_files import (
    AWS,
    COMPOSE,
    DEPLOY,
    DOC,
    DOCKERFILE,
    FILES,
    KUBERAY,
    ROOT,
    changed,
    documents,
    image_variables,
    literal_secrets,
    pods,
    problems,
)


def ray_commands() -> list[str]:
    return [
        line
        for line in AWS["head_start_ray_commands"] + AWS["worker_start_ray_commands"]
        if "ray start" in line
    ]


@pytest.mark.parametrize("file", FILES)
def test_a_file_fits_its_schema(file):
    assert [
        problem for i, made in enumerate(documents(file)) for problem in problems(file, i, made)
    ] == []


@pytest.mark.parametrize(
    ("file", "index", "path", "value"),
    [
        ("compose.yaml", 0, "services.head.healthcheck>healthchek", None),
        ("compose.yaml", 0, "services.worker.pre_stop.0.comand", "x"),
        ("compose.yaml", 0, "services.s3.ports", "9000:9000"),
        ("kuberay-job.yaml", 0, "spec.backoffLimit>backOffLimit", None),
        ("kuberay-job.yaml", 0, "metadata.nane", "x"),
        ("kuberay-job.yaml", 0, "spec.rayClusterSpec.workerGroupSpecs.0.replicas", "2"),
        (
            "kuberay-job.yaml",
            0,
            "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.envFrom.0.secretref",
            {},
        ),
        ("kuberay-job.yaml", 1, "spec.ingress.0.form", []),
        ("kuberay-job.yaml", 1, "spec.policyTypes.0", "ingress"),
        ("kuberay-cluster.yaml", 0, "spec.authOptions.mode", "tokens"),
        (
            "kuberay-cluster.yaml",
            0,
            "spec.workerGroupSpecs.0.template.spec.containers.0.lifecycle.prestop",
            {},
        ),
        (
            "kuberay-cluster.yaml",
            0,
            "spec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.cpu",
            "32 cores",
        ),
        ("kuberay-cluster.yaml", 1, "spec.podSelector.matchLabel", {}),
        ("ray-aws.yaml", 0, "idle_timeout_minutes>idle_timout_minutes", None),
        ("ray-aws.yaml", 0, "docker.imgae", "x"),
        ("ray-aws.yaml", 0, "available_node_types.spot.node_config.InstanceMarketOption", {}),
        (
            "ray-aws.yaml",
            0,
            "available_node_types.head.node_config.BlockDeviceMappings.0.Ebs.VolumeSize",
            "200 GB",
        ),
    ],
)
def test_a_mistyped_field_is_refused(file, index, path, value):
    assert problems(file, index, changed(documents(file)[index], path, value))


@pytest.mark.parametrize("file", FILES)
def test_no_secret_stands_in_a_file(file):
    assert literal_secrets(documents(file)) == []


@pytest.mark.parametrize(
    "planted",
    [
        {"environment": {"POSTGRES_PASSWORD": "x"}},
        {"env": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]},
        {"MLFLOW_BACKEND_STORE_URI": "postgresql://mlflow:x@database/mlflow"},
        {"command": ["ray", "AKIAIOSFODNN7EXAMPLE"]},
    ],
)
def test_a_secret_in_a_file_would_be_found(planted):
    assert literal_secrets(planted)


def test_the_image_has_no_secret():
    assert literal_secrets(image_variables()) == []
    assert "ARG" not in DOCKERFILE


@pytest.mark.parametrize("file", [*FILES, "Dockerfile"])
def test_every_image_has_an_exact_version(file):
    text = (DEPLOY / file).read_text()
    images = re.findall(r"^\s*-? ?(?:image:(?: &\w+)?|FROM) +([^\s*]\S+)", text, re.M)
    assert (
        images
        and [image for image in images if not re.search(r":\d+\.\d+(\.\d+)?(-[\w-]+)?$", image)]
        == []
    )


def test_our_image_has_the_version_of_the_project():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    texts = [(DEPLOY / file).read_text() for file in (*FILES, "Dockerfile")] + [DOC]
    assert version and {
        tag for text in texts for tag in re.findall(r"hemoco:(\d[\w.]*)", text)
    } == {version[1]}


def test_compose_publishes_on_loopback_only():
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []
    assert not any("network_mode" in service for service in COMPOSE["services"].values())


def test_every_ray_asks_for_a_token():
    assert image_variables()["RAY_AUTH_MODE"] == "token"
    services = [
        service
        for service in COMPOSE["services"].values()
        if service.get("command", [""])[0] == "ray"
    ]
    assert [service["environment"]["RAY_AUTH_MODE"] for service in services] == ["token"] * 3
    job, cluster = (documents(file)[0]["spec"] for file in KUBERAY)
    assert job["rayClusterSpec"]["authOptions"] == cluster["authOptions"] == {"mode": "token"}
    commands = ray_commands()
    assert len(commands) == 2 and all(
        "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=" in command for command in commands
    )


def test_the_image_has_the_variables_that_jobs_get(monkeypatch):
    for name in (
        "AWS_ENDPOINT_URL",
        "AWS_DEFAULT_REGION",
        "MLFLOW_TRACKING_URI",
    ):  # of this session
        monkeypatch.delenv(name, raising=False)
    for name in job_spec("http://head:8265", "run", ["run"], ROOT).variables:
        monkeypatch.delenv(name, raising=False)
    given = job_spec("http://head:8265", "run", ["run"], ROOT).variables
    assert {
        name: value for name, value in given.items() if "_GIT_" not in name
    }.items() <= image_variables().items()


def test_all_have_the_ray_of_this_environment():
    job, cluster = (documents(file)[0]["spec"] for file in KUBERAY)
    assert job["rayClusterSpec"]["rayVersion"] == cluster["rayVersion"] == ray.__version__
    assert f'"ray=={ray.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_the_words_of_the_rayjob_are_understood_and_fill_its_workers():
    spec = documents("kuberay-job.yaml")[0]["spec"]
    python, dash_m, module, verb, *words = shlex.split(spec["entrypoint"])
    assert (python, dash_m, module, verb) == ("python", "-m", "jobs", "run")
    options = typed_options(verb, words, ReportOptions)
    asked: ResourcesConfig = options.recipe.pretrain.resources
    limits = pods("kuberay-job.yaml")["worker"]["containers"][0]["resources"]["limits"]
    nodes, gpus = (
        spec["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"],
        int(limits["nvidia.com/gpu"]),
    )
    assert options.run and options.storage
    assert asked.workers * asked.gpus_per_worker == nodes * gpus
    assert gpus * asked.cpus_per_worker <= int(limits["cpu"])


@pytest.mark.parametrize("file", KUBERAY)
def test_a_pod_gets_what_it_asks_for_and_has_shared_memory(file):
    for pod in pods(file).values():
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert [
            volume["emptyDir"]["medium"] for volume in pod["volumes"] if volume["name"] == "shm"
        ] == ["Memory"]


@pytest.mark.parametrize("file", KUBERAY)
def test_a_worker_has_time_to_save_a_checkpoint(file):
    pod = pods(file)["worker"]
    assert pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == [
        "python",
        "-m",
        "cluster.drain",
    ]
    assert (
        pod["terminationGracePeriodSeconds"] >= 60 + 30 + 10
    )  # the drain, Ray's own end, some slack


def test_both_kuberay_files_describe_the_same_worker():
    assert pods("kuberay-job.yaml")["worker"] == pods("kuberay-cluster.yaml")["worker"]


def test_the_cluster_does_not_take_the_secret_with_the_credentials_for_its_token():
    sources = pods("kuberay-cluster.yaml")["head"]["containers"][0]["envFrom"]
    names = [source["secretRef"]["name"] for source in sources if "secretRef" in source]
    assert names and documents("kuberay-cluster.yaml")[0]["metadata"]["name"] not in names


def pod_labels(file: str) -> list[dict[str, str]]:
    spec = documents(file)[0]["spec"]
    spec = spec.get("rayClusterSpec", spec)
    return [
        group["template"]["metadata"]["labels"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]


@pytest.mark.parametrize("file", KUBERAY)
def test_the_network_policy_is_for_the_pods_of_its_own_file_and_lets_them_in(file):
    policy = documents(file)[1]["spec"]
    (other,) = {*KUBERAY} - {file}
    for chosen in (policy["podSelector"], policy["ingress"][0]["from"][0]["podSelector"]):
        wanted = chosen["matchLabels"].items()
        assert all(wanted <= labels.items() for labels in pod_labels(file))
        assert not any(wanted <= labels.items() for labels in pod_labels(other))


def test_the_driver_in_a_container_is_told_the_commit_and_whether_it_is_dirty():
    told = {
        name
        for name in COMPOSE["services"]["driver"]["environment"]
        if name.startswith("HEMOCO_GIT")
    }
    assert (
        told
        == {"HEMOCO_GIT_COMMIT", "HEMOCO_GIT_DIRTY"}
        == set(re.findall(r"export (HEMOCO_GIT_\w+)=", DOC))
    )


def test_a_ray_that_does_not_answer_takes_only_its_share_of_the_time(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        assert _drain(9.0) == "it has not answered within 3 s"


def test_a_drain_that_cannot_be_begun_is_told_and_not_raised(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert _drain(9).startswith("FileNotFoundError: ")


@pytest.mark.parametrize(
    "command", [*AWS["head_start_ray_commands"], *AWS["worker_start_ray_commands"]]
)
def test_a_command_of_the_launcher_is_good_shell(command):
    subprocess.run(["bash", "-n", "-c", command], check=True, capture_output=True)


def test_the_modules_that_the_files_run_exist():
    texts = [DOC, *((DEPLOY / file).read_text() for file in FILES)]
    named = {name for text in texts for name in re.findall(r"python,? -m,? ([a-z][\w.]*)", text)}
    assert named == {"jobs", "cluster.drain"}
    assert (ROOT / "jobs" / "__main__.py").is_file() and (ROOT / "cluster" / "drain.py").is_file()


def test_the_verbs_that_the_guide_types_exist():
    typed = re.findall(r"(?:python -m jobs|^ +hemoco) ([a-z]+)", DOC, re.M)
    typed += re.findall(r"submit ([a-z]+) RECIPE", DOC)
    assert set(typed) >= {"submit", "preflight", "status", "stop", "sync", "run"}
    assert set(typed) <= _VERBS.keys()


def test_the_files_that_the_guide_names_exist():
    named = set(re.findall(r"\b(?:cluster|tests|docs)/[\w./-]+\.\w+", DOC)) | {
        "cluster/deploy/Dockerfile"
    }
    assert {f"cluster/deploy/{file}" for file in ("compose.yaml", "ray-aws.yaml")} <= named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_driver_of_compose_has_the_checkout():
    source = COMPOSE["services"]["driver"]["volumes"][0].partition(":")[0]
    assert (DEPLOY / source).resolve() == ROOT


def test_the_names_in_kubernetes_that_the_guide_types_exist():
    names = {document["metadata"]["name"] for file in KUBERAY for document in documents(file)}
    typed = re.findall(r"(?:rayjob|raycluster|job/|secret|service/)\s?(hemoco-\w+)", DOC)
    assert {"hemoco-imagenet", "hemoco-cluster"} <= set(typed) <= names


def test_the_guide_makes_every_secret_that_compose_asks_for():
    asked = set(re.findall(r"\$\{(\w+):\?", (DEPLOY / "compose.yaml").read_text()))
    made = re.search(r"for name in ([A-Z_\\\s0-9]+); do", DOC)
    assert made and set(made[1].replace("\\", " ").split()) == asked


def test_the_upload_leaves_secrets_behind(tmp_path):
    for name in (
        "hemoco/tokens.py",
        "tests/test_x.py",
        "stack.env",
        "nodes/node.env",
        "nodes/ray_token",
        "ssh.key",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".rayignore").write_bytes((ROOT / ".rayignore").read_bytes())
    assert uploaded_files(tmp_path).keys() == {".rayignore", "hemoco/tokens.py"}
