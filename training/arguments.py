"""All options of a training run, from a recipe and the command line."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .machine import shown_command
from .options.data import DataOptions
from .options.fields import fields_of
from .options.model import ModelOptions
from .options.parser import given_values, make
from .options.recipe import RECIPES, read_recipe, recipe_words
from .options.rule import settle
from .options.run import RunOptions
from .tasks import get_task


@dataclass
class Arguments:
    """All options of a run; `command` is how to repeat it."""

    run: RunOptions
    model: ModelOptions
    data: DataOptions
    task: Any
    command: str = ""

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.run.output_dir or f"runs/{self.run.task}-{self.model.architecture}")

    def flat(self) -> dict[str, Any]:
        """Every option by its name."""
        parts = (self.run, self.model, self.data, self.task)
        return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}


def parse_arguments(argv: list[str] | None = None, program: str = "training.train") -> Arguments:
    """Options from `[RECIPE.yaml] [--option value …]`; the command line wins over the recipe.

    Without a recipe the defaults of `recipes/<task>.yaml` are used if there is such a file.

    Raises:
        UserError: an unknown key or option (naming the nearest right one), a value that is not allowed, or an option
            that would do nothing.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    words = argv[1:] if argv and not argv[0].startswith("-") else argv
    source = Path(argv[0]) if len(words) < len(argv) else None
    if source is not None and not source.is_file() and (RECIPES / f"{source.name}.yaml").is_file():
        source = RECIPES / f"{source.name}.yaml"
    recipe = read_recipe(source) if source is not None else {}
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default=recipe.get("task", "char_lm"))
    task = get_task(first.parse_known_args(words)[0].task)
    usual = RECIPES / f"{task.default_recipe or task.name}.yaml"
    if source is None and usual.is_file():
        source = usual
        recipe = read_recipe(source)

    classes = [RunOptions, ModelOptions, DataOptions, task.Options]
    fields = fields_of(classes)
    given = given_values(classes, words, program)
    lines = given_values(classes, recipe_words(recipe, fields, str(source)), program)
    run, model, data, own = make(classes, settle(lines, given, fields))
    return Arguments(run, model, data, own, shown_command(argv, program))
