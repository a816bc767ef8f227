"""README.md and docs/: every name, link and command that a page mentions exists."""

import ast
import re

import pytest
import yaml

from hemoco import config
from jobs import cli
from tests.helpers.docs_commands import jobs_commands, problem_with
from tests.helpers.docs_names import unknown_names
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
SHELL_BLOCKS = [
    block for page in pages() for block in blocks(page) if block.language in ("bash", "console", "")
]


@pytest.mark.parametrize("page", pages())
def test_links_lead_to_files_and_headings_that_exist(page: str) -> None:
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        name = file.relative_to(ROOT).as_posix()
        if not file.exists() or (anchor and anchor not in anchors(name)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", pages())
def test_names_that_a_page_mentions_exist(page: str) -> None:
    assert not unknown_names(page)


@pytest.mark.parametrize("page", pages())
def test_commands_in_the_text_of_a_page_name_verbs_that_exist(page: str) -> None:
    verbs = [
        match[1]
        for text in inline_code(page)
        if (match := re.search(r"python -m jobs ([a-z]+)", text)) is not None
    ]
    assert {*verbs} <= {*cli._VERBS}


@pytest.mark.parametrize("page", pages())
def test_code_blocks_say_their_language(page: str) -> None:
    assert not [str(block) for block in blocks(page) if block.language not in LANGUAGES]


def commands_of(block: Block) -> list[list[str]]:
    """Arguments of `python -m jobs`, or of docs/deploy.md's shell function `hemoco`, in a block."""
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


@pytest.mark.parametrize(
    "block",
    [block for page in pages() for block in blocks(page) if block.language == "yaml"],
    ids=str,
)
def test_yaml_of_a_page_is_a_mapping(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.text), dict)
