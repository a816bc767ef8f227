"""Names that pages mention between backticks, and whether hemoco has them.

The first form of `_FORMS` that a piece of inline code matches decides what it must be the name of.
What matches none (a value, a formula, a command of another program) is not checked.
"""

import dataclasses
import functools
import re
import subprocess
import typing
from collections.abc import Callable

from hemoco import config
from hemoco.tracking.tags import Tag
from jobs.options import recipe_names
from tests.helpers.docs_pages import blocks, inline_code
from tests.helpers.house import ROOMS, ROOT

_NOT_OURS = (
    *("main_moco.py", "main_lincls.py", "CONFIG.md"),  # the official code of MoCo
    *("--pretrained", "--mlp", "--aug-plus", "--batch-size"),  # and its options
    "optimizer.batch_size",  # solo-learn
    *("--num-cpus", "--num-gpus", "--volumes"),  # Ray and Docker
    *("mine.py", "sheet.png"),  # files of the reader
)


def unknown_names(page: str) -> list[str]:
    """Names on a page that hemoco does not have: `kind: name`, one for each."""
    defined = _defined_on(page)
    unknown = []
    for text in inline_code(page):
        word = text.split(" ")[0]
        if word in _NOT_OURS:
            continue
        if word in defined or word.rpartition(".")[2] in defined:
            continue
        for kind, pattern, exists in _FORMS:
            if re.fullmatch(pattern, word):
                unknown += [] if exists(word) else [f"{kind}: {text}"]
                break
    return unknown


def _defined_on(page: str) -> set[str]:
    """Classes, settings and files that the code blocks of a page define, as an example does."""
    text = "\n".join(block.text for block in blocks(page))
    classes = re.findall(r"\bclass (\w+)", text)
    files = (block.file for block in blocks(page))
    return {*classes, *files, *re.findall(r"^\+    (\w+): \w", text, re.MULTILINE)}


def _is_config_class(text: str) -> bool:
    return hasattr(config, text)


def _is_flag(text: str) -> bool:
    """True for a flag that is a setting, or one of a verb or of a program in cluster/deploy/."""
    name = re.sub(r"\.no_", ".", text.removeprefix("--"))
    if "." in name:
        return _is_setting(name)
    commands = (ROOT / "docs" / "reference" / "commands.md").read_text()  # test_reference holds it
    option = f"**`{text}`**" in commands
    return _is_setting(name) or option or f'"{text}"' in _code() or text in _deployment()


def _is_setting(text: str) -> bool:
    """True if a recipe has this setting or group of settings; outer groups may be left out."""
    name = re.sub(r"^transfers\.\w+", "transfers.NAME", text)
    return any(known == name or known.endswith(f".{name}") for known in _settings())


@functools.cache
def _settings() -> set[str]:
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


def _is_recipe(text: str) -> bool:
    return text in recipe_names()


def _is_tag_or_module(text: str) -> bool:
    """True for a tag, and for the dotted name of a module or of what a module defines."""
    tags = [value for name, value in vars(Tag).items() if name.isupper()]
    prefixes = tuple(tag for tag in tags if tag.endswith(("/", "_")))
    if text in tags or text.startswith(prefixes):
        return True
    parts = text.split(".")
    for end in range(len(parts), 0, -1):
        for file in (f"{'/'.join(parts[:end])}.py", f"{'/'.join(parts[:end])}/__init__.py"):
            if (ROOT / file).is_file():
                source = (ROOT / file).read_text()
                return all(re.search(rf"\b{part}\b", source) for part in parts[end:])
    return False


def _is_variable(text: str) -> bool:
    name = text.removeprefix("$").partition("/")[0]
    return name in _code() or name in _deployment()


def _is_path(text: str) -> bool:
    """True for the path, from any folder, of a file or folder, or of a file that runs write."""
    name = text.rstrip("/")
    known = any(f"/{path}".endswith(f"/{name}") or f"/{name}/" in f"/{path}" for path in _files())
    return known or f'"{text}"' in _code()


_FORMS: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("config class", r"[A-Z]\w*Config", _is_config_class),
    ("flag", r"--[a-z][\w.-]*", _is_flag),
    ("recipe", r"(imagenet|cifar10)_\w+|transfer_(imagenet|coco|voc)", _is_recipe),
    ("tag or module", r"hemoco\.[a-z][\w./]*", _is_tag_or_module),
    ("variable", r"\$?HEMOCO_\w+(/.*)?", _is_variable),
    ("path", r"(hemoco|pipeline|jobs|cluster|tests|docs|\.ci)/[\w./-]*", _is_path),
    ("path", r"(?!INIT|\.\.)[\w./-]*\w\.(py|md|yaml|svg|png)", _is_path),
    (
        "setting",
        r"(pretrain|moco|optimizer|views|encoder|stream|resources)(\.(?!test_)[a-z_]+)+",
        _is_setting,
    ),
)


@functools.cache
def _code() -> str:
    """hemoco's own code as one text."""
    rooms = (ROOT / room for room in ROOMS)
    return "\n".join(path.read_text() for room in rooms for path in sorted(room.rglob("*.py")))


@functools.cache
def _deployment() -> str:
    folder = ROOT / "cluster" / "deploy"
    return "\n".join(path.read_text() for path in sorted(folder.iterdir()))


@functools.cache
def _files() -> list[str]:
    """Paths of all files of the checkout that git has or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
