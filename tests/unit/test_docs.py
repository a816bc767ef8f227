"""README.md and docs/: every name, link and command that a page mentions exists."""

import ast
import dataclasses
import functools
import re
import subprocess
import typing
from pathlib import Path

import pytest

from hemoco import config
from hemoco.tracking.tags import Tag
from jobs.options import recipe_names
from tests.helpers.docs_commands import jobs_commands, problem_with
from tests.helpers.docs_pages import (
    Block,
    anchors,
    blocks,
    inline_code,
    links,
    pages,
    shell_commands,
)
from tests.helpers.house import ROOT

LANGUAGES = {"bash", "console", "python", "diff", "text", "yaml", ""}
ROOMS = ("hemoco", "pipeline", "jobs", "cluster", "tests", "docs", ".ci")
NOT_IN_CHECKOUT = re.compile(
    r"/mnt/|~|\$|://|NAME|INIT|DIR|<|\*|^\.?/|images/|results/|pretrain/|curve/|bad_samples"
)
FOREIGN = ("main_moco.py", "main_lincls.py", "CONFIG.md")
"""Files of the official code."""
WRITTEN_BESIDE = ("docs/reference/", "docs/is-my-loss-normal.md", "docs/coming-from.md")
"""Pages that another branch adds; to be emptied when both are merged."""
SHELL_BLOCKS = [
    block for page in pages() for block in blocks(page) if block.language in ("bash", "console", "")
]


@functools.cache
def tracked() -> list[str]:
    """Paths of all files of the checkout that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@functools.cache
def code() -> str:
    """All of hemoco's own code as one text."""
    rooms = (ROOT / room for room in ("hemoco", "pipeline", "jobs", "cluster"))
    return "\n".join(path.read_text() for room in rooms for path in sorted(room.rglob("*.py")))


@functools.cache
def settings() -> set[str]:
    """Dotted names of all settings of a recipe; `NAME` stands for the name of a transfer."""
    names: set[str] = set()

    def walk(prefix: str, kind: object) -> None:
        for part in typing.get_args(kind) or (kind,):
            if not (isinstance(part, type) and dataclasses.is_dataclass(part)):
                continue
            hints = typing.get_type_hints(part)
            for field in dataclasses.fields(part):
                names.add(f"{prefix}{field.name}")
                walk(f"{prefix}{field.name}.", hints[field.name])

    walk("", config.Recipe)
    walk("transfers.NAME.", config.AnyTransferConfig)
    return names


def is_setting(name: str) -> bool:
    """Whether a recipe has a setting or a group of settings of this name; groups may be left out at its start."""
    name = re.sub(r"^transfers\.[\w]+\.", "transfers.NAME.", name)
    return any(known == name or known.endswith(f".{name}") for known in settings())


def is_file(name: str, page: str) -> bool:
    """Whether a path is that of a file or folder: from the root, from a package, or from the page's folder."""
    name = name.removesuffix("/")
    folders = ("", "hemoco/", f"{Path(page).parent.as_posix()}/")
    if any((ROOT / f"{folder}{name}").exists() for folder in folders):
        return True
    return any(path.endswith(f"/{name}") or f"/{name}/" in path for path in tracked())


@functools.cache
def defined_on(page: str) -> set[str]:
    """Classes and settings that the code blocks of a page define, as an example does."""
    text = "\n".join(block.text for block in blocks(page))
    found = re.findall(r"\bclass (\w+)|^\+    (\w+): \w", text, re.MULTILINE)
    return {name for pair in found for name in pair if name}


def unknown_name(text: str, page: str) -> str:
    """What is wrong with a piece of inline code; empty where it is right or of no form that can be checked."""
    if re.split(r"[ .=]", text.partition(" ")[0])[-1] in defined_on(page) or ".test_" in text:
        return ""
    if text in FOREIGN or text in WRITTEN_BESIDE:
        return ""
    if (flag := re.match(r"--([a-z_][\w.-]*)", text)) and not problem_with_flag(flag[1], text):
        return ""
    if flag:
        return problem_with_flag(flag[1], text)
    if re.fullmatch(r"\w+Config(\.\w+)?", text):
        name, _, field = text.partition(".")
        known = getattr(config, name, None)
        return (
            ""
            if known
            and (
                not field
                or hasattr(known, field)
                or field in str([each.name for each in dataclasses.fields(known)])
            )
            else "no such config class"
        )
    if re.fullmatch(r"(imagenet|cifar10|transfer)_\w+", text):
        return (
            ""
            if text in recipe_names() or f" {text}" in code() or is_in_code(text)
            else "no such recipe"
        )
    if re.fullmatch(r"hemoco\.[\w./]+", text):
        return "" if is_tag(text) or is_python_name(text) else "no such tag or module"
    if re.fullmatch(r"HEMOCO_\w+", text.removeprefix("$").partition("/")[0]):
        return "" if is_in_code(text.removeprefix("$").partition("/")[0]) else "no such variable"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?|[\w-]+\.(py|md|yaml|png|svg)", text):
        if NOT_IN_CHECKOUT.search(text) or text == "mine.py":
            return ""
        looks_like_ours = text.split("/")[0] in ROOMS or text.endswith(
            (".py", ".md", ".yaml", ".svg")
        )
        return (
            ""
            if not looks_like_ours or is_file(text, page) or f'"{text}"' in code()
            else "no such file"
        )
    dotted = re.fullmatch(
        r"(pretrain|moco|optimizer|views|encoder|stream|resources|data|transfers)\.[a-z_.]+", text
    )
    if dotted and not text.endswith(".py"):
        return "" if is_setting(text) else "no such setting"
    return ""


def problem_with_flag(flag: str, text: str) -> str:
    """Whether `--flag` is that of a verb, a setting of a recipe, or an option of a foreign program in that text."""
    flag = re.sub(r"\.no_", ".", flag)
    if "." in flag:
        return "" if is_setting(flag) else "no such setting"
    name = flag.replace("-", "_").removeprefix("no_")
    if is_setting(name) or re.search(
        rf"\b{name}: |\"--{re.escape(flag)}\"|--{re.escape(flag)}\b", code()
    ):
        return ""
    deploy = "".join(path.read_text() for path in (ROOT / "cluster/deploy").iterdir())
    foreign = (
        "num-cpus",
        "num-gpus",
        "break-system-packages",
        "volumes",
        "app-name",
        "allowed-hosts",
        "pretrained",
    )
    return "" if flag in foreign or f"--{flag}" in deploy else "no such flag"


def is_tag(text: str) -> bool:
    values = [value for name, value in vars(Tag).items() if name.isupper()]
    return text in values or any(
        value.endswith(("/", "_")) and text.startswith(value) for value in values
    )


def is_python_name(text: str) -> bool:
    """Whether a dotted name is that of a module or of something defined in one."""
    parts = text.split(".")
    for end in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:end])
        file = (
            base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        )
        if file.is_file():
            return all(re.search(rf"\b{part}\b", file.read_text()) for part in parts[end:])
    return False


def is_in_code(text: str) -> bool:
    return text in code() or any(
        text in (ROOT / path).read_text()
        for path in tracked()
        if path.startswith("cluster/deploy/")
    )


@pytest.mark.parametrize("page", pages())
def test_links_lead_to_files_and_headings_that_exist(page: str) -> None:
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        name = file.relative_to(ROOT).as_posix()
        if not file.exists():
            broken += [target] if name not in [each.rstrip("/") for each in WRITTEN_BESIDE] else []
        elif anchor and anchor not in anchors(name):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", pages())
def test_names_that_a_page_mentions_exist(page: str) -> None:
    unknown = {text: unknown_name(text, page) for text in inline_code(page)}
    assert not {text: problem for text, problem in unknown.items() if problem}


@pytest.mark.parametrize("page", pages())
def test_commands_in_the_text_of_a_page_name_verbs_that_exist(page: str) -> None:
    verbs = [
        match[1]
        for text in inline_code(page)
        if (match := re.search(r"python -m jobs ([a-z]+)", text)) is not None
    ]
    wrong = [verb for verb in verbs if f'    "{verb}":' not in (ROOT / "jobs/cli.py").read_text()]
    assert not wrong


@pytest.mark.parametrize("page", pages())
def test_code_blocks_say_their_language(page: str) -> None:
    assert not [str(block) for block in blocks(page) if block.language not in LANGUAGES]


def commands_of(block: Block) -> list[list[str]]:
    """What `python -m jobs` gets in a block; `hemoco` is the shell function of docs/deploy.md that calls it."""
    if block.language == "" and "python -m jobs" not in block.text:
        return []  # an indented block that shows something else
    found = []
    for command in shell_commands(block.text):
        if command[:1] == ["hemoco"]:
            found.append(command[1:])
        found += [argv for argv in jobs_commands(command) if argv[:1] not in ([], ["$@"])]
    return found


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=str)
def test_commands_of_a_block_are_read_by_the_command_line(block: Block) -> None:
    problems = [problem_with(argv) for argv in commands_of(block)]
    assert not [problem for problem in problems if problem]


@pytest.mark.parametrize(
    "block",
    [block for page in pages() for block in blocks(page) if block.language == "python"],
    ids=str,
)
def test_python_of_a_page_compiles_and_its_recipes_are_valid(block: Block) -> None:
    tree = ast.parse(block.text)
    assigned = [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    if "recipe" in assigned:
        values: dict[str, object] = {}
        exec(compile(tree, str(block), "exec"), values)
        assert isinstance(values["recipe"], config.Recipe)
