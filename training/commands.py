"""The command that makes a run again, although recipes change."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from typing import Any

from .arguments import OFF_AT_ZERO, parse_arguments
from .errors import UserError
from .idle_options import given_names, idle
from .machine import UNSHOWN

# What turns off an option that a recipe has got since.
OFF = {"max_recurrent_norm": 0.0, **dict.fromkeys(OFF_AT_ZERO, 0)}
PLACES = ("dataset", "model", "output_dir")  # a command shows the last part of a path alone


def without(words: list[str], names: Collection[str]) -> list[str]:
    """Command-line words without the options of those names and their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = bool(given_names([word]) & set(names))
        if not dropping:
            kept.append(word)
    return kept


def amended(command: str, options: dict[str, Any], config: dict[str, Any]) -> str:
    """A recorded command, with the options that made the run and that its recipe has changed since."""
    words = shlex.split(command)
    start = next((i for i, word in enumerate(words) if word.startswith("training.train")), None)
    if start is None:
        return command
    words = without(words, idle(options))  # what had no effect then is refused now
    differing = words
    while differing:  # an option that is added can displace others of the recipe, which then need not be turned off
        try:
            now = parse_arguments(words[start + 1 :]).flat()
        except UserError:  # of a recipe that is gone, or with options that were allowed then
            return command
        differing, off = [], list[str]()
        without_effect = idle({**now, **options})  # refused on a command line
        for name, value in now.items():
            if name in without_effect:
                continue
            before, unset = options.get(name), False
            if before is None and value is not None:
                # Not set then: what the model took for it. The bound of the norm is in no config.
                unset = config.get(name) is None
                before = OFF.get(name) if unset else config[name]
            if before is None or isinstance(before, list) or name in (*UNSHOWN, *PLACES) or f"--{name}" in words:
                continue
            if before != value and (before or value):
                added = off if unset else differing
                added += [f"--{name}", before if isinstance(before, str) else json.dumps(before)]
        differing = differing or off
        words = words + differing
    return shlex.join(words)
