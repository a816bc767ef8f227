"""docs/how-to/run-on-your-own-machines.md, block by block, on a head and two nodes.

The hosts are network namespaces. Three things of the blocks are replaced: the address, the recipe,
and options by which three hosts of one machine keep apart (each has one core, its own address and
folder for Ray).
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.docs_pages import Block, blocks
from tests.helpers.docs_sandbox import Sandbox
from tests.helpers.drawn_sets import write_class_zip
from tests.helpers.hosts import Host, hosts
from tests.helpers.house import ROOT
from tests.helpers.waiting import within

PAGE = "docs/how-to/run-on-your-own-machines.md"
RECIPE = ROOT / "tests" / "helpers" / "two_node_recipe.py"
pytestmark = pytest.mark.timeout(900)


class Machines:
    """The three hosts, the folder in which one types, and what was printed."""

    def __init__(self, folder: Path, machines: tuple[Host, ...]) -> None:
        self.head, *self.nodes = machines
        self.sandbox = Sandbox(folder / "me")
        self.folder = folder
        self.output = ""

    def run(self, block: Block) -> None:
        """Runs a block on the machines of its comment, `on: head` or `on: nodes`.

        With `stays` it does not wait for the end of the block.
        """
        place, _, stays = block.comment.removeprefix("on: ").partition(", ")
        for host in [self.head] if place == "head" else self.nodes:
            script = f"cd {self.sandbox.folder}\n{self._fitted(block.text, host)}"
            log = self.folder / f"{host.name}-{block.line}.log"
            process = host.start(
                "bash", "-euc", script, log=log, environment=self.sandbox.environment
            )
            if not stays:
                assert process.wait(timeout=600) == 0, log.read_text()[-3000:]
                self.output += log.read_text(errors="replace")

    def _fitted(self, text: str, host: Host) -> str:
        text = text.replace("10.0.0.1", self.head.address).replace("mine.py", str(RECIPE))
        text = text.replace("--num-cpus 0", f"--num-cpus 0 --temp-dir {host.shared}/ray")
        own = f"--num-cpus 1 --node-ip-address {host.address}"
        return text.replace("--address $HEAD:6379", f"--address $HEAD:6379 {own}")

    def wait_for_servers(self) -> None:
        """Until S3 and MLflow answer."""
        self._wait_until(self.head.has_s3_and_mlflow)

    def wait_for_nodes(self, count: int) -> None:
        """Until so many nodes have joined, the head among them."""
        self._wait_until(lambda: self._alive_nodes() == count)

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        """Fails with the logs where it does not come to hold."""
        if not within(180, holds):
            logs = sorted(self.folder.glob("*.log"))
            pytest.fail("\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in logs))

    def _alive_nodes(self) -> int:
        file = self.sandbox.home / ".config" / "hemoco" / "cluster.env"
        token = re.search(r"RAY_AUTH_TOKEN=(\w+)", file.read_text())
        assert token is not None
        status, body = self.head.answer(8265, "/nodes?view=summary", token[1])
        if status != 200:
            return 0
        nodes = json.loads(body)["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """The machines after every block of the page."""
    folder = tmp_path_factory.mktemp("machines")
    with hosts(folder, 3) as three:
        machines = Machines(folder, three)
        for seed, split in enumerate(("train", "test")):
            path = write_class_zip(folder / f"{split}.zip", split, per_class=26, seed=seed)
            zipfile.ZipFile(path).extractall(machines.sandbox.folder / "images")
        secrets, s3, mlflow, head, nodes, runs, drain = [
            block for block in blocks(PAGE) if block.comment.startswith("on: ")
        ]
        machines.run(secrets)
        machines.run(s3)
        machines.run(mlflow)
        machines.wait_for_servers()
        machines.run(head)
        machines.wait_for_nodes(1)
        machines.run(nodes)
        machines.wait_for_nodes(3)
        machines.run(runs)
        machines.run(drain)
        yield machines


def test_preflight_finds_room_on_the_two_nodes(walked: Machines) -> None:
    assert re.search(r"room pretrain +2 x 1 CPU: the nodes have room for 2", walked.output)


def test_the_run_ends_with_its_table(walked: Machines) -> None:
    output = walked.output
    assert "FINISHED" in output
    assert re.search(r"^knn +top1 +[\d.]+", output, re.MULTILINE)


def test_secrets_are_readable_by_their_owner_only(walked: Machines) -> None:
    file = walked.sandbox.home / ".config" / "hemoco" / "cluster.env"
    assert file.stat().st_mode & 0o077 == 0
