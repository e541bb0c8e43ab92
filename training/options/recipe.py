"""Recipes: YAML files with the options of a run, flat, by the names of the command line."""

from collections.abc import Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import UserError
from ..common.files import one_line
from .parser import nearest

RECIPES = Path(__file__).parent.parent / "recipes"
# Of a value in a recipe: what YAML gives it by itself. Its text alone counts, so they make no difference.
TAGS = [f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")]
MAX_RECIPE = 1 << 20  # bytes


def read_recipe(path: Path) -> dict[str, str]:
    """The flat mapping of a recipe file: names to values as they are written, as on the command line.

    So `no` and `010` mean what they mean there; YAML 1.1 would make false and 8 of them. Keys without a value are left
    out.

    Raises:
        UserError: no such file, not YAML, not a mapping of names to values, a key given twice.
    """
    if not path.is_file():
        names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        raise UserError(f"recipe {str(path)!r} does not exist; recipes here: {', '.join(names)}")
    if path.stat().st_size > MAX_RECIPE:
        raise UserError(f"recipe {str(path)!r} has {path.stat().st_size:,} bytes; it may have {MAX_RECIPE:,}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        check_flat(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text, or what check_flat refuses
        raise UserError(f"recipe {str(path)!r} is not valid YAML: {one_line(error)}") from error
    except OSError as error:
        raise UserError(f"recipe {str(path)!r} cannot be read: {error.strerror or error}") from error
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"recipe {str(path)!r} must be a mapping of option names to values")
    values: dict[str, str] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"recipe {str(path)!r}, line {line}: a key must be the name of an option")
        if key.value in lines:
            raise UserError(
                f"recipe {str(path)!r}: {key.value!r} is given twice, in lines {lines[key.value]} and {line}"
            )
        lines[key.value] = line
        value = written(value, f"recipe {str(path)!r}, line {line}: {key.value}")
        if value is not None:
            values[key.value] = value
    return values


def check_flat(text: str) -> None:
    """`ValueError` for a recipe with aliases, which can stand for more than memory holds, or deep nesting."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it has the alias *{event.anchor}; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 3:
            raise ValueError("it is nested deeper than a list of lists")


def written(node: yaml.Node, where: str) -> str | None:
    """A value of a recipe as it is written, lists (of lists) in brackets; None for an empty one."""
    if node.tag not in TAGS:
        raise UserError(f"{where} has the tag {node.tag}, and must be a plain value")
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in ("", "~", "null", "Null", "NULL") else node.value
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(written(item, where) or 'null' for item in node.value)}]"
    raise UserError(f"{where} must be a value or a list of pairs")


def recipe_words(values: Mapping[str, str], fields: Mapping[str, Field[Any]], source: str) -> list[str]:
    """A recipe as command-line words, so that both are converted and checked in the same way."""
    words: list[str] = []
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"{source}: unknown key {name!r}{nearest(name, list(fields))}")
        if "bool" in str(fields[name].type):  # what YAML itself allows beside yes, no, true and false
            value = {"on": "true", "off": "false"}.get(value.lower(), value)
        words.append(f"--{name}={value}")
    return words
