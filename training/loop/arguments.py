"""All options of a training run, from a recipe and the command line."""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.machine import shown_command
from ..options.data import DataOptions
from ..options.fields import fields_of
from ..options.model import OFF_AT_ZERO, ModelOptions
from ..options.parser import given_values, make
from ..options.recipe import RECIPES, read_recipe, recipe_words
from ..options.rule import idle, is_off, settle
from ..options.run import RunOptions
from ..tasks import get_task

# Options of one occasion: where a run goes and whether it is published is not what it is.
OCCASION = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint"),
    *("push_to_hub", "hub_model_id", "hub_private_repo"),
}


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


def resolved(arguments: Arguments, config: Any, precision: str) -> dict[str, Any]:
    """Every option of a run, in place of None what it came to.

    Args:
        config: of the model. precision: of accelerate, whose launcher may have chosen it.
    """
    values = {name: value for name, value in arguments.flat().items() if name not in OCCASION}
    values["mixed_precision"] = precision
    values["dataset"] = values["dataset"] or get_task(arguments.run.task).default_dataset
    if arguments.model.model is not None:  # which brings its config
        return values
    known = {f.name for f in dataclasses.fields(ModelOptions)} & {f.name for f in dataclasses.fields(config)}
    values |= {name: getattr(config, name) for name in known}
    values |= {name: 0 for name in OFF_AT_ZERO if name in known and values[name] is None}
    values |= {"parameter_budget": None}
    if values.get("factor_shapes"):
        values |= {"factor_size": None, "factor_shapes": ",".join(f"{p}x{q}" for p, q in values["factor_shapes"])}
    own = {f.name: f for f in dataclasses.fields(ModelOptions)}
    fields = {f.name: f for f in dataclasses.fields(RunOptions)} | own  # a field of the model may be of one task alone
    without_effect = idle({name: values[name] for name in fields.keys() & values.keys()}, fields)
    return values | {name: None for name in own.keys() & without_effect if not is_off(own[name], values[name])}


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
