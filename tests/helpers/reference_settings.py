"""The parts of docs/reference/settings.md that are read from the config classes."""

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from typing import Any

from hemoco import config
from hemoco.config.settings import is_free
from tests.helpers.reference_text import field_docs, paragraphs, rules, type_text, value_text


def settings_blocks() -> dict[str, str]:
    """Text of each block of the page."""
    return {
        "settings": "\n\n".join(_recipe_sections()),
        "transfers": "\n\n".join(
            _section(cls.__name__, "transfers.NAME.", cls(), level=3) for cls in _transfer_classes()
        ),
        "sweep": "\n\n".join([_sweep_section(), _ranges()]),
    }


def _recipe_sections() -> Iterator[str]:
    recipe = config.Recipe(name="example")
    pretrain = recipe.pretrain
    yield _section("The recipe", "", recipe)
    yield _section("data", "data.", recipe.data)
    yield _section("pretrain", "pretrain.", pretrain)
    for name in ("views", "encoder"):
        yield _section(f"pretrain.{name}", f"pretrain.{name}.", getattr(pretrain, name))
    yield _section("pretrain.moco of v1 and v2", "pretrain.moco.", pretrain.moco, outer=pretrain)
    yield _section("pretrain.moco of v3", "pretrain.moco.", config.MoCoV3Config())
    for name in ("optimizer", "stream", "resources"):
        part = getattr(pretrain, name)
        yield _section(f"pretrain.{name}", f"pretrain.{name}.", part, outer=pretrain)


def _sweep_section() -> str:
    space = {"pretrain.optimizer.lr": config.LogUniform(0.01, 0.1)}
    return _section("sweep", "sweep.", config.SweepConfig(objective="knn", space=space))


def _transfer_classes() -> list[type[Any]]:
    """Every class that a transfer is made of, bases before those that inherit from them."""
    ordered: dict[type[Any], None] = {}
    for leaf in typing.get_args(config.AnyTransferConfig):
        for cls in reversed(leaf.__mro__[:-1]):
            ordered[cls] = None
    return list(ordered)


def _section(title: str, prefix: str, part: Any, *, outer: Any = None, level: int = 2) -> str:
    """One class: its summary and the settings that it declares itself.

    Args:
        title: heading.
        prefix: with which the names of its settings begin.
        part: an instance, whose values are the defaults.
        outer: the config that holds the part and checks its settings against others.
        level: level of the heading.
    """
    cls = type(part)
    file = inspect.getmodule(cls).__name__.replace(".", "/")  # type: ignore[union-attr]
    where = f"`{cls.__name__}` in `{file}.py`"
    bases = [base.__name__ for base in cls.__mro__[1:-1]]
    if bases:
        where += ", with all settings of " + ", ".join(f"`{base}`" for base in bases)
    heading = f"`{title}`" if title == cls.__name__ or prefix == f"{title}." else title
    lines = [f"{'#' * level} {heading}", "", f"{paragraphs(cls.__doc__)} ({where})", ""]
    lines += [line for field in _own_fields(cls) for line in _setting(prefix, part, field, outer)]
    return "\n".join(lines)


def _own_fields(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    """Settings that the class declares or gives another default, without parts with a section."""
    own = inspect.get_annotations(cls)
    fields = [field for field in dataclasses.fields(cls) if field.name in own]
    return [field for field in fields if not _is_config(field)]


def _is_config(field: dataclasses.Field[Any]) -> bool:
    made = field.default_factory
    return isinstance(made, type) and dataclasses.is_dataclass(made)


def _setting(prefix: str, part: Any, field: dataclasses.Field[Any], outer: Any) -> Iterator[str]:
    name = prefix + field.name
    if name in ("transfers", "sweep"):  # they have sections of their own
        return
    hint = typing.get_type_hints(type(part))[field.name]
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    default = "required" if required else f"default {value_text(getattr(part, field.name))}"
    facts = [type_text(hint), default]
    if is_free(name) and not name.startswith("sweep."):  # a sweep has an identity of its own
        facts.append("*may change on resume*")
    yield f"- **`{name}`** ({', '.join(facts)})<br>"
    text = field_docs(type(part)).get(field.name, "")
    stated = [f"*Rule:* {rule}." for rule in _rules(part, field.name, outer)]
    yield "  " + " ".join([text, *stated]).strip()


def _rules(part: Any, name: str, outer: Any) -> list[str]:
    """Rules that the part checks itself, then those that the config around it checks."""

    def changed(value: object) -> Any:
        return dataclasses.replace(part, **{name: value})

    default = getattr(part, name)
    own = rules(changed, default, name)
    if outer is None:
        return own
    (holder,) = (
        each.name for each in dataclasses.fields(outer) if getattr(outer, each.name) is part
    )

    def changed_outer(value: object) -> Any:
        return dataclasses.replace(outer, **{holder: changed(value)})

    return list(dict.fromkeys([*own, *rules(changed_outer, default, name)]))


def _ranges() -> str:
    lines = ["### Ranges of `sweep.space`", ""]
    for cls in (config.Choice, config.Uniform, config.LogUniform):
        names = ", ".join(field.name for field in dataclasses.fields(cls))
        lines.append(f"- **`{cls.__name__}({names})`**<br>\n  {paragraphs(cls.__doc__)}")
    return "\n".join(lines)
