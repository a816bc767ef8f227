"""The checkout that is uploaded to a cluster: its commit, and the files that Ray would upload."""

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
"""Patterns of .gitignore for files that are never uploaded: not needed there, or secret."""
_PACKAGES = ("hemoco", "pipeline", "jobs", "cluster")
_LIMIT_BYTES = 64 * 1024**2  # the head keeps uploads in memory, and each node unpacks them
_SHOWN = 3
_IGNORED = "a .gitignore or .rayignore of the checkout names it; correct that file"


def git_facts(checkout: Path) -> dict[str, str]:
    """Returns the tags that name the commit of a checkout.

    An uploaded checkout has no .git. There, HEMOCO_GIT_COMMIT and HEMOCO_GIT_DIRTY name it, which
    `submit` sets. If there is a .git, these variables are ignored: they may have been exported for
    another state of the checkout.

    Returns:
        `mlflow.source.git.commit` and `hemoco.git_dirty` (true, false or unknown); empty if the
        commit is not known.
    """
    # An empty prefix means that the checkout is the root of its repository. If it merely is in a
    # folder of somebody's repository, HEAD is not its commit.
    is_root = _git(checkout, "rev-parse", "--show-prefix") == ""
    commit = _git(checkout, "rev-parse", "HEAD") if is_root else None
    if commit:
        dirty = "false" if _git(checkout, "status", "--porcelain") == "" else "true"
    else:
        commit = os.environ.get("HEMOCO_GIT_COMMIT", "")
        dirty = os.environ.get("HEMOCO_GIT_DIRTY", "")
        if dirty not in ("true", "false"):
            dirty = "unknown"
    return {"mlflow.source.git.commit": commit, Tag.GIT_DIRTY: dirty} if commit else {}


def upload_problems(checkout: Path, recipe_file: Path | None) -> list[str]:
    """Lists what would keep a job from finding on the cluster what it needs of the checkout.

    Args:
        checkout: folder that would be uploaded.
        recipe_file: a recipe given by its path.

    Returns:
        One line for each problem: a recipe or a module that is not uploaded, an upload that is too
        large. Empty if there is none.
    """
    checkout = checkout.resolve()
    files = uploaded_files(checkout)
    problems = []
    if recipe_file is not None:
        recipe = recipe_file.resolve()
        if not recipe.is_relative_to(checkout):
            problems.append(
                f"{recipe_file}: lies outside the checkout {checkout}, which is all that is "
                "uploaded; move it there"
            )
        elif str(recipe.relative_to(checkout)) not in files:
            problems.append(f"{recipe_file}: would not be uploaded: {_IGNORED}")
    absent = []
    for package in _PACKAGES:
        for path in sorted((checkout / package).rglob("*.py")):
            name = str(path.relative_to(checkout))
            if name not in files:
                absent.append(name)
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        problems.append(f"{absent[0]}{more} would not be uploaded: {_IGNORED}")
    size = sum(files.values())
    if size > _LIMIT_BYTES:
        largest = sorted(files, key=lambda name: files[name], reverse=True)[:_SHOWN]
        named = ", ".join(f"{name} ({_megabytes(files[name])})" for name in largest)
        problems.append(
            f"{checkout}: {len(files)} files with {_megabytes(size)} would be uploaded, at most "
            f"{_megabytes(_LIMIT_BYTES)} may; the largest: {named}; move data elsewhere, or name "
            "it in .rayignore"
        )
    return problems


def uploaded_files(checkout: Path) -> dict[str, int]:
    """Lists the files that Ray would upload: size in bytes by path in the checkout."""
    # Ray has no public function for this; `test_the_upload_is_what_ray_packs` compares the result
    # with a package that Ray made
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


def _git(checkout: Path, *argv: str) -> str | None:
    """Runs git and returns its output.

    None if there is no git, no repository, or one that git does not trust.
    """
    # without it, `git status` would write a refreshed index
    quiet = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *argv],
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
