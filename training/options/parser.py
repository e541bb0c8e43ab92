"""From words to options, for every command of `training`."""

import argparse
import difflib
from collections.abc import Callable
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from transformers.hf_argparser import string_to_bool

from kru_hf.configuration_kru import REMOVED

from ..common.errors import UserError, printable
from .fields import MAX_COUNT, NEVER, REQUIRED, check, fields_of, require
from .rule import settle


class Parser(argparse.ArgumentParser):
    """Options of dataclasses in groups, with `-` and `_` alike. What it returns has been given: it has no defaults.

    Its errors are `UserError`, without the page of usage.
    """

    def __init__(self, classes: list[Any], program: str) -> None:
        usage = f"{program} [RECIPE.yaml] [--option value …]" if program.startswith("training.train") else None
        super().__init__(program, usage, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        groups: dict[str, Any] = {}
        for name, kind in ((name, kind) for part in classes for name, kind in get_type_hints(part).items()):
            field = fields_of(classes)[name]
            title, default = field.metadata.get("group", "task"), field.default
            group = groups.get(title) or groups.setdefault(title, self.add_argument_group(title))
            shown = (
                field.metadata["help"]
                if default in (None, "", REQUIRED)
                else f"{field.metadata['help']} (default: {default})"
            )
            spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
            kind, *_ = (
                [part for part in get_args(kind) if part is not NoneType] if NoneType in get_args(kind) else [kind]
            )
            settings: dict[str, Any] = {"type": string_to_bool if kind is bool else kind}
            if kind is bool:
                settings |= {"nargs": "?", "const": True}
            if get_origin(kind) is Literal:
                settings = {"choices": get_args(kind)}
            elif default is None and field.metadata.get("off", NEVER) is not NEVER:
                settings["type"] = or_none(settings["type"])
            group.add_argument(*spellings, dest=name, help=shown.replace("%", "%%"), **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """`kind` for a word; None for `none`."""

    def convert(word: str) -> Any:
        return None if word.lower() == "none" else kind(word)

    convert.__name__ = getattr(kind, "__name__", "value")  # argparse says it
    return convert


def nearest(name: str, known: list[str]) -> str:
    """What to say after an unknown name: what replaces it, ` (did you mean 'x'?)`, or nothing if nothing is near."""
    if name in REMOVED:
        return f": {REMOVED[name]}"
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def given_values(classes: list[Any], words: list[str], program: str) -> dict[str, Any]:
    """The options that command-line words name, and no others."""
    namespace, rest = Parser(classes, program).parse_known_args(words)
    for word in rest:
        if word.startswith("-"):
            name = word.lstrip("-").split("=")[0].replace("-", "_")
            raise UserError(f"unknown option {word!r}{nearest(name, list(fields_of(classes)))}")
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: a recipe comes first, then --option value")
    values, fields = vars(namespace), fields_of(classes)
    for name, value in values.items():
        if isinstance(value, int) and "seed" not in name:
            require(value <= MAX_COUNT, name, value, f"at most {MAX_COUNT}")
        check(fields[name], value)
        if name != "dataset" and isinstance(value, str) and printable(value) != value:
            raise UserError(f"{name}={value!r} is not valid: it must be UTF-8, as the libraries need that write there")
    return values


def make(classes: list[Any], values: dict[str, Any]) -> list[Any]:
    """One object of each dataclass; `UserError` says which options without a default are not given."""
    for name, field in fields_of(classes).items():
        if field.default is REQUIRED and name not in values:
            raise UserError(f"{name} is missing: pass --{name}: {field.metadata['help']}")
    return [kind(**{name: values[name] for name in fields_of([kind]) if name in values}) for kind in classes]


def parse_words(classes: list[Any], words: list[str], program: str) -> list[Any]:
    """One object of each dataclass from command-line words; an option that would do nothing is refused."""
    return make(classes, settle({}, given_values(classes, words, program), fields_of(classes)))
