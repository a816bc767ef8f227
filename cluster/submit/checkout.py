"""The checkout that travels to a cluster: which commit it is, and what of it Ray would upload."""

import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from hemoco.tracking.tags import Tag

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder that holds hemoco/, pipeline/, jobs/ and cluster/."""
EXCLUDES = (
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    ".*_cache",
    "*.egg-info",
    "dist",
    ".env",
    ".env.*",
    "*.pem",
)
"""What is never uploaded, in the words of .gitignore: not needed there, or secret."""
_ROOMS = ("hemoco", "pipeline", "jobs", "cluster")
_LIMIT_BYTES = 64 * 1024**2  # the head keeps packages in memory, each node unpacks them
_SHOWN = 3
_IGNORED = "a .gitignore or .rayignore of the checkout names it; correct that file"


def git_facts(checkout: Path) -> dict[str, str]:
    """`mlflow.source.git.commit` and `hemoco.git_dirty` (true, false, unknown); empty where nothing tells the commit.

    An uploaded checkout has no .git: there HEMOCO_GIT_COMMIT and HEMOCO_GIT_DIRTY tell, which `submit` sets. Where git
    tells, they count for nothing: they may have been exported for another state of the checkout.
    """
    # of a checkout that merely lies in somebody's repository, git would tell that one's commit
    if _git(checkout, "rev-parse", "--show-prefix") == "" and (
        commit := _git(checkout, "rev-parse", "HEAD")
    ):
        return _facts(commit, "false" if _git(checkout, "status", "--porcelain") == "" else "true")
    commit = os.environ.get("HEMOCO_GIT_COMMIT", "")
    dirty = os.environ.get("HEMOCO_GIT_DIRTY", "")
    return _facts(commit, dirty if dirty in ("true", "false") else "unknown") if commit else {}


def upload_problems(checkout: Path, recipe_file: Path | None) -> list[str]:
    """Why a job would not find on the cluster what it needs of the checkout; empty if all is well.

    Args:
        checkout: what would be uploaded.
        recipe_file: a recipe given by its path.

    Returns:
        One line each: a recipe or a module that is not uploaded, an upload that is too large.
    """
    checkout = checkout.resolve()
    files = uploaded_files(checkout)
    problems = [_recipe_problem(checkout, recipe_file, files)] if recipe_file else []
    code = (
        path.relative_to(checkout)
        for room in _ROOMS
        for path in sorted((checkout / room).rglob("*.py"))
    )
    if absent := [str(path) for path in code if str(path) not in files]:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        problems.append(f"{absent[0]}{more} would not be uploaded: {_IGNORED}")
    size = sum(files.values())
    if size > _LIMIT_BYTES:
        largest = sorted(files, key=lambda name: files[name], reverse=True)[:_SHOWN]
        named = ", ".join(f"{name} ({_megabytes(files[name])})" for name in largest)
        problems.append(
            f"{checkout}: {len(files)} files with {_megabytes(size)} would be uploaded, at most "
            f"{_megabytes(_LIMIT_BYTES)} may; the largest: {named}; move data elsewhere, or name it in .rayignore"
        )
    return [problem for problem in problems if problem]


def uploaded_files(checkout: Path) -> dict[str, int]:
    """What Ray would put into the package for the cluster: path in the checkout and size in bytes."""
    # Ray has no public question for this; a test compares the answer with a package that Ray made
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    files: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            files[str(path.relative_to(checkout))] = path.stat().st_size

    excludes: list[Callable[[Path], bool]] = [_get_excludes(checkout, list(EXCLUDES))]
    by_git = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(checkout, excludes, note, include_gitignore=by_git, logger=logger)
    return files


def _recipe_problem(checkout: Path, recipe_file: Path, files: dict[str, int]) -> str:
    path = recipe_file.resolve()
    if not path.is_relative_to(checkout):
        return f"{recipe_file}: lies outside the checkout {checkout}, which is all that is uploaded; move it there"
    if str(path.relative_to(checkout)) not in files:
        return f"{recipe_file}: would not be uploaded: {_IGNORED}"
    return ""


def _facts(commit: str, dirty: str) -> dict[str, str]:
    return {"mlflow.source.git.commit": commit, Tag.GIT_DIRTY: dirty}


def _git(checkout: Path, *words: str) -> str | None:
    """What git answers; None where there is no git, no repository, or one that git does not trust."""
    quiet = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # only to look: nothing in .git is to change
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *words],
            env=quiet,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
