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


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error instead of a silent overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
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
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path}: not readable as YAML: {' '.join(str(error).split())}") from None
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
            raise InputError(f"--set {setting}: no '=' found. Write --set key.path=value, e.g. pruning.steps=5")
        try:
            new_value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"--set {setting}: {text!r} is not a YAML value; quote it") from None
        keys = path.split(".")
        target = value
        for depth, key in enumerate(keys):
            allowed = _keys_at(model, keys[:depth])
            if key not in allowed:
                raise InputError(f"--set {setting}: {_unknown_key('.'.join(keys[: depth + 1]), key, allowed)}")
            if depth < len(keys) - 1:
                target[key] = target.get(key) or {}
                target = target[key]
        target[keys[-1]] = new_value


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
        else:
            lines.append(f"{where}={fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}")
    return f"{origin}: " + "\n  ".join(lines)


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
