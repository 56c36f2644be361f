"""Questions to the schema that pydantic does not answer: what an error's path means, where plug-ins go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, Tag


class Plug(NamedTuple):
    """A place of the schema that holds one of several kinds of mapping, chosen by `key`."""

    path: tuple[str, ...]
    """`*` stands for every item of a list."""
    key: str
    optional: bool
    """Whether null may stand there instead."""
    default: BaseModel | None
    """What stands there when the recipe says nothing."""


def choices(annotation: Any) -> dict[str, Any]:
    """The members of an annotation by the label pydantic's error paths give them: tag or type name."""
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        tags = [note.tag for note in notes if isinstance(note, Tag)]
        return {tags[0]: inner} if tags else choices(inner)
    if get_origin(annotation) in (Union, UnionType):
        return {label: one for member in get_args(annotation) for label, one in choices(member).items()}
    if annotation is NoneType:
        return {}
    return {annotation.__name__ if isinstance(annotation, type) else str(annotation): annotation}


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def section(annotation: Any) -> type[BaseModel] | None:
    """The (first) section among the members of an annotation."""
    return next((one for one in choices(annotation).values() if is_section(one)), None)


def chooser(annotation: Any) -> str | None:
    """The key that chooses among several kinds of mapping; None where there is nothing to choose."""
    options = [*choices(annotation).values()]
    if len(options) < 2 or not all(is_section(option) for option in options):
        return None
    return next(key for key in ("type", "mode", "format") if key in options[0].model_fields)


class Trace(NamedTuple):
    """What an error's path means: the keys to its value, and the types around and at its end."""

    keys: tuple[str | int, ...]
    parent: Any
    """The type that holds the last key."""
    end: Any
    """The type at the end."""
    branch: bool
    """Whether the path ends in a union's label, so that the error speaks for one member only."""


def trace(model: type[BaseModel], loc: Sequence[str | int]) -> Trace:
    """The meaning of a pydantic `loc`, which mixes the data's keys with the labels of union members."""
    keys: list[str | int] = []
    here: Any = model
    parent: Any = model
    branch = False
    for step in loc:
        options = choices(here)
        branch = len(options) > 1
        if branch:
            here = options.get(str(step), Any)
        else:
            keys.append(step)
            parent = next(iter(options.values()), Any)
            here = _inside(parent, step)
    return Trace(tuple(keys), parent, here, branch)


def _inside(holder: Any, key: str | int) -> Any:
    if is_section(holder):
        field = holder.model_fields.get(str(key))
        return field.annotation if field else Any
    arguments = get_args(holder)
    return arguments[-1 if get_origin(holder) is dict else 0] if arguments else Any


@cache
def plugs(model: type[BaseModel]) -> tuple[Plug, ...]:
    """Every place where the schema takes one of several kinds of mapping."""
    return tuple(_plugs_in(model, (), None))


def _plugs_in(annotation: Any, at: tuple[str, ...], default: Any) -> Iterator[Plug]:
    key = chooser(annotation)
    if key is not None:
        yield Plug(
            at, key, NoneType in get_args(annotation), default if isinstance(default, BaseModel) else None
        )
    for option in choices(annotation).values():
        if get_origin(option) is tuple:
            yield from _plugs_in(get_args(option)[0], (*at, "*"), None)
        elif is_section(option):
            for name, field in option.model_fields.items():
                yield from _plugs_in(field.annotation, (*at, name), field.default)
