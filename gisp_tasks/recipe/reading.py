"""Reading a recipe file, applying ``--set``, and saying what is wrong with it."""

import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from gisp_tasks.errors import InputError

MAX_RECIPE_BYTES = 64 * 1024


class _PlainLoader(yaml.SafeLoader):
    """YAML without surprises: a repeated key is an error, not a silent overwrite, and there are no aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(
                None,
                None,
                "aliases (*name) are not allowed",
                self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """The YAML mapping in a file.

    Raises:
        InputError: no such file, too large, not YAML, or not a mapping.
    """
    if not path.is_file():
        raise InputError(f"recipe {path}: no such file. Give the path of a YAML recipe, e.g. dags/recipes/demo.yaml")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise InputError(f"recipe {path}: {path.stat().st_size} bytes, at most {MAX_RECIPE_BYTES} are allowed")
    value = _parse(path.read_bytes(), f"recipe {path}")
    if not isinstance(value, dict):
        raise InputError(f"recipe {path}: a mapping was expected, found {type(value).__name__}. See README, recipes")
    return value


def apply_settings(value: dict[str, Any], settings: tuple[str, ...], model: type[BaseModel]) -> None:
    """Write ``key.path=value`` overrides into ``value``.

    Raises:
        InputError: no '=', a key that the recipe does not have, or a value that is not YAML.
    """
    for setting in settings:
        path, separator, text = setting.partition("=")
        if not separator:
            raise InputError("--set: no '=' found. Write --set key.path=value, e.g. pruning.steps=5")
        # The value is not repeated in messages: it may be a secret in the wrong place.
        origin = f"--set {path}"
        keys = tuple(path.split("."))
        for depth, key in enumerate(keys):
            allowed = _keys_at(model, list(keys[:depth]))
            if key not in allowed:
                raise InputError(f"{origin}: {_unknown_key('.'.join(keys[: depth + 1]), key, allowed)}")
        set_value(value, keys, _parse(text.encode(), origin), origin=origin)


def set_value(value: dict[str, Any], keys: tuple[str, ...], new_value: Any, *, origin: str) -> None:
    """Write ``new_value`` at the path ``keys``, making the sections on the way.

    Raises:
        InputError: a section on the way is there and is no mapping.
    """
    target = value
    for depth, key in enumerate(keys[:-1]):
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise InputError(
                f"{origin}: {'.'.join(keys[: depth + 1])} is {_shown(target)} in the recipe, and a mapping was "
                f"expected; correct the recipe"
            )
    target[keys[-1]] = new_value


def _parse(text: bytes, origin: str) -> Any:
    try:
        return yaml.load(text.decode("utf-8"), Loader=_PlainLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{origin}: not readable as YAML: {error.problem}{where}; correct or quote it") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{origin}: not readable as YAML ({type(error).__name__}); correct or quote it") from None


def describe_errors(error: ValidationError, model: type[BaseModel], origin: str) -> str:
    """One line a fault: where, what was asked, what is allowed."""
    lines = []
    for fault in error.errors(include_url=False):
        where = _dotted(fault["loc"])
        if fault["type"] == "extra_forbidden":
            key = str(fault["loc"][-1])
            lines.append(_unknown_key(where, key, _keys_at(model, [str(part) for part in fault["loc"][:-1]])))
        elif fault["type"] == "missing":
            lines.append(f"{where}: required, and missing")
        elif fault["type"] == "value_error":
            lines.append(f"{where}: {fault['ctx']['error']}" if where else str(fault["ctx"]["error"]))
        elif fault["type"] != "too_short" or fault["loc"][-1:] != ("levels",) or not fault["input"]:
            lines.append(f"{where}={_shown(fault['input'])}: {fault['msg'][0].lower()}{fault['msg'][1:]}")
    return f"{origin}: " + "\n  ".join(lines)


def _shown(value: Any) -> str:
    """A value as a message may repeat it: short, and no address, which may hold a password."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 and not {"@", ":"} & set(value) else "a text"
    return repr(value) if value is None or isinstance(value, bool | int | float) else f"a {type(value).__name__}"


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _unknown_key(where: str, key: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(key, allowed, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{where}: unknown key.{hint} Allowed here: {', '.join(allowed) or 'nothing below a plain value'}"


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys that a recipe may have below ``path``."""
    section: type[BaseModel] | None = model
    for key in path:
        field = section.model_fields.get(key) if section else None
        section = _section_of(field.annotation) if field else None
    return list(section.model_fields) if section else []


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside ``Section`` or ``Section | None``."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
