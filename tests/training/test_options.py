"""Options that would do nothing: refused on the command line, dropped from a recipe; what is off is never refused."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from kru_hf.cells import STARTS
from kru_hf.configuration_kru import ACTIVATIONS, BLOCK_TYPES, CELL_TYPES, KRUConfig
from kru_hf.frame_heads import FRAME_HEADS
from kru_hf.scan import BACKENDS
from training.common.errors import UserError
from training.loop.arguments import parse_arguments
from training.models.baselines import BaselineConfig
from training.models.build import build_model
from training.models.unitary import UnitaryKRUConfig
from training.options.data import DataOptions
from training.options.fields import MAX_SEED, NEVER, Is, fields_of
from training.options.model import ARCHITECTURES, BASELINES, ModelOptions
from training.options.parser import Parser, parse_words
from training.options.rule import idle, is_off, missing, value_of
from training.options.run import RunOptions
from training.tasks import get_task

RELEASED = Path(__file__).parents[2] / "model_cards"
TEXT = {"vocab_size": 52, "pad_token_id": 0}
CLASSES = [RunOptions, ModelOptions, DataOptions]
FIELDS = fields_of(CLASSES)
CHOICES = {
    "architecture": ARCHITECTURES,
    "cell_type": CELL_TYPES,
    "block_type": BLOCK_TYPES,
    "activation": ACTIVATIONS,
    "backend": BACKENDS,
    "recurrent_init": tuple(STARTS),
    "frame_head": FRAME_HEADS,
    "task": ("char_lm", "piano_roll"),
    "optimizer": ("adamw", "rmsprop"),
    "weight_dtype": ("fp32", "int8", "int4"),
    "transition": ("fixed", "selective"),
    "lr_scheduler_type": ("cosine", "plateau", "constant"),
}
TEXTS = {"factor_shapes": "2x2", "resume_from_checkpoint": "last", "hub_model_id": "me/kru"}
CONDITIONS = [(name, one) for name, field in FIELDS.items() for one in field.metadata["only"]]


def sample(name):
    """A value of an option that is not off."""
    kind = str(FIELDS[name].type)
    plain = True if "bool" in kind else 2 if "int" in kind else 0.5 if "float" in kind else TEXTS.get(name, "x")
    return CHOICES[name][-1] if name in CHOICES else plain


def values_of(name, wanted):
    """A value that fulfils a part of a condition, and one that does not; None: it is not given."""
    if isinstance(wanted, Is):
        return (sample(name), None) if wanted is Is.ON else (None, sample(name))
    if isinstance(wanted, int):
        return wanted, wanted - 1
    choices = CHOICES.get(name, (True, False))
    return next(v for v in choices if v in wanted), next((v for v in choices if v not in wanted), None)


def given(values):
    """What has to be given for these values: defaults need not."""
    return {name: value for name, value in values.items() if value not in (None, value_of(name, {}, FIELDS))}


def words_of(values):
    return [f"--{name}={value}" for name, value in given(values).items()]


def settings(name, condition):
    """What fulfils a condition, and the same with one part that is not, for each part."""
    good = {other: values_of(other, wanted)[0] for other, wanted in condition.items()}
    if "push_to_hub" in good and name != "hub_model_id":
        good["hub_model_id"] = "me/kru"
    broken = [{**good, other: values_of(other, wanted)[1]} for other, wanted in condition.items()]
    return good, [{k: v for k, v in one.items() if k != "hub_model_id"} for one in broken]


@pytest.mark.parametrize(("name", "condition"), CONDITIONS, ids=lambda one: one if isinstance(one, str) else "")
def test_an_option_works_where_it_says_and_nowhere_else(name, condition, tmp_path):
    empty, recipe = tmp_path / "empty.yaml", tmp_path / "recipe.yaml"
    empty.write_text("task: char_lm\n")
    good, broken = settings(name, condition)
    asked, off = f"--{name}={sample(name)}", FIELDS[name].metadata["off"]
    assert parse_arguments([str(empty), *words_of(good), asked]).flat()[name] == sample(name)
    recipe.write_text("".join(f"{key}: {value}\n" for key, value in {**given(good), name: sample(name)}.items()))
    for other in broken:
        if not missing(name, given(other), FIELDS) or idle(given(other), FIELDS):
            continue  # another of its conditions holds, or a default does; or it is not the only one
        with pytest.raises(UserError, match=" has no effect here: it works with .*; remove "):
            parse_arguments([str(empty), *words_of(other), asked])
        changed = [f"--{key}={value}" for key, value in other.items() if value is not None and value != good.get(key)]
        if changed:
            assert parse_arguments([str(recipe), *changed]).flat()[name] in (FIELDS[name].default, 0, 0.01)
        if off is not NEVER:
            parse_arguments([str(empty), *words_of(other), f"--{name}={'none' if off is None else off}"])
    if off is not NEVER and name != "hub_model_id":  # what is pushed needs one
        value = parse_arguments([str(recipe), f"--{name}={'none' if off is None else off}"]).flat()[name]
        assert is_off(FIELDS[name], value)


def test_conditions_name_options_and_values_that_exist():
    for name, condition in CONDITIONS:
        for other, wanted in condition.items():
            assert other in FIELDS, name
            if not isinstance(wanted, (Is, int)):
                assert set(wanted) <= set(CHOICES.get(other, (True, False))), name
    for field in FIELDS.values():
        assert set(field.metadata["replaces"]) <= set(FIELDS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_has_the_fields_that_its_options_name(architecture):
    config = BaselineConfig if architecture in BASELINES else KRUConfig
    config = UnitaryKRUConfig if architecture == "unitary" else config
    own = {field.name for field in dataclasses.fields(config)}
    other = {"architecture", "model", "parameter_budget", "max_recurrent_norm"}
    for name in fields_of([ModelOptions]).keys() - other:
        only = [one["architecture"] for one in FIELDS[name].metadata["only"] if "architecture" in one]
        if not only or architecture in set(itertools.chain(*only)):
            assert name in own, name


@pytest.mark.parametrize(
    ("words", "name", "needed"),
    [
        ("--optimizer=rmsprop --adam-beta2=0.8", "adam_beta2=0.8", "optimizer adamw"),
        ("--max_steps 9 --num_train_epochs 2", "num_train_epochs=2.0", "max_steps -1"),
        ("--architecture lstm --num_hidden_layers 1 --hidden_dropout 0.5", "hidden_dropout=0.5", ".*_layers 2 or more"),
        ("--architecture lstm --backend cpu", "backend='cpu'", "architecture kru, unitary"),
        ("--architecture lstm --freeze_factors", "freeze_factors=True", "architecture kru, unitary"),
        ("ptb_char --readout_norm false --layer_norm_epsilon 1e-3", "layer_norm_epsilon=0.001", "readout_norm true"),
        ("pixel_mnist --bidirectional true --use_cache true", "use_cache=True", "bidirectional false"),
        ("--resume_from_checkpoint last --overwrite_output_dir true", "overwrite_output_dir=True", "a new run"),
        ("--hub_private_repo true", "hub_private_repo=True", "push_to_hub true"),
        ("--model x --state_size 5", "state_size=5", "a new network, not with model"),
        ("--cell_type kru_gru --bias_init 0.5", "bias_init=0.5", "cell_type kru"),
    ],
)
def test_what_the_message_says(words, name, needed):
    with pytest.raises(UserError, match=f"{name} has no effect here: it works with {needed}"):
        parse_arguments(words.split())


def test_a_recipes_model_that_contradicts_itself_is_refused_unless_the_command_line_helps(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("block_type: plain\nintermediate_size: 4\noptimizer: rmsprop\nadam_beta1: 0.5\n")
    with pytest.raises(UserError, match="intermediate_size=4 has no effect here: it works with block_type residual"):
        parse_arguments([str(recipe)])
    assert parse_arguments([str(recipe), "--block_type", "residual"]).model.intermediate_size == 4
    assert parse_arguments([str(recipe), "--intermediate_size", "0", "--optimizer", "adamw"]).run.adam_beta1 == 0.5


@pytest.mark.parametrize(
    ("lines", "words", "expected"),
    [
        ("state_size: 16\nkronecker_terms: 2", "--kronecker_terms 0", {"state_size": 16}),
        ("state_size: 16\nio_rank: 3", "--io_rank none", {"state_size": 16}),
        ("io_rank: 3", "--kronecker_terms 0", {"io_rank": 3}),
        ("io_rank: 3", "--kronecker_terms 2", {"kronecker_terms": 2}),
        ("kronecker_terms: 2", "--io_rank 3", {"io_rank": 3}),
        ("block_type: plain\nrecurrent_init: slow", "--cell_type kru_gru",
         {"block_type": "plain", "cell_type": "kru_gru"}),
        ("state_size: 8\nblock_type: plain\nfactor_size: 8", "--architecture lstm", {"state_size": 8}),
        ("factor_shapes: 3x3,4x4\nunitary_loss_coef: 0.1\nio_rank: 4", "--architecture unitary",
         {"factor_shapes": [[3, 3], [4, 4]], "io_rank": 4}),
        ("num_hidden_layers: 3\nhidden_size: 8\nio_rank: 2", "--block_type plain", {"block_type": "plain"}),
        ("num_hidden_layers: 3\nhidden_dropout: 0.1", "--block_type residual",
         {"num_hidden_layers": 3, "hidden_dropout": 0.1, "block_type": "residual"}),
        ("num_hidden_layers: 2\nhidden_dropout: 0.1", "--architecture lstm --num_hidden_layers 1",
         {"num_hidden_layers": 1}),
        ("num_hidden_layers: 2", "--architecture lstm --hidden_dropout 0.2",
         {"num_hidden_layers": 2, "hidden_dropout": 0.2}),
        ("state_size: 36\nfactor_shapes: 6x6,6x6", "--parameter_budget 50000", {}),
        ("parameter_budget: 50000", "--state_size 24", {"state_size": 24}),
        ("state_size: 36\nfactor_shapes: 6x6,6x6", "--state_size 24", {"state_size": 24}),
        ("state_size: 36\nfactor_size: 6", "--factor_shapes 2x2", {"factor_shapes": [[2, 2]]}),
        ("state_size: 36\nkronecker_terms: 2", "--model somewhere", {}),
        ("chrono_max_length: 0", "--architecture rnn --io_rank 0", {}),
        ("cell_type: kru_lstm\nchrono_max_length: 50", "--cell_type kru_gru",
         {"cell_type": "kru_gru", "chrono_max_length": 50}),
        ("cell_type: kru_lstm\nchrono_max_length: 50", "--architecture gru", {"chrono_max_length": 50}),
        ("cell_type: kru_lstm\nchrono_max_length: 50", "--architecture unitary", {}),
        ("cell_type: kru_lstm\nchrono_max_length: 50", "--cell_type kru", {"cell_type": "kru"}),
    ],
)  # fmt: skip
def test_what_is_left_of_a_recipe(lines, words, expected, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"{lines}\n")
    assert parse_arguments([str(tmp_path / "recipe.yaml"), *words.split()]).model.config_values() == expected


def test_what_is_left_of_a_recipes_run(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 5\nweight_decay: 0.2\nadam_beta2: 0.9\nmax_recurrent_norm: 1.0\n")
    assert parse_arguments([str(recipe), "--num_train_epochs", "2"]).run.max_steps == -1
    run = parse_arguments([str(recipe), "--optimizer", "rmsprop"]).run
    assert (run.weight_decay, run.max_steps) == (0, 5)
    assert parse_arguments([str(recipe)]).model.max_recurrent_norm == 1
    for words in ("--freeze_factors", "--cell_type=kru_gru", "--architecture=unitary", "--max_recurrent_norm=0"):
        assert not parse_arguments([str(recipe), words]).model.max_recurrent_norm
    assert parse_arguments(["training/recipes/ptb_char.yaml"]).run.weight_decay == 0.01


@pytest.mark.parametrize("name", ["io_rank", "kronecker_terms", "intermediate_size", "chrono_max_length"])
def test_zero_builds_what_leaving_it_out_builds(name):
    for architecture in ("kru", "lstm"):
        options = ModelOptions(architecture, state_size=8, **{name: 0})
        assert getattr(build_model("causal_lm", options, **TEXT).config, name, None) is None
    with pytest.raises(UserError, match=f"^{name}=-1 is not valid: it must be positive, or 0 to turn it off$"):
        parse_arguments([f"--{name}", "-1"])


def test_a_trained_model_keeps_what_it_has():
    options = parse_arguments(["--model", "somewhere", "--io_rank", "0"]).model
    options.check_turned_off(KRUConfig())
    with pytest.raises(UserError, match="brings its own configuration, with io_rank=3; remove io_rank"):
        options.check_turned_off(KRUConfig(io_rank=3))


def test_seeds_that_torch_takes():
    from training.compose import ComposeOptions

    assert parse_arguments(["--seed", str(MAX_SEED)]).run.seed == MAX_SEED
    for seed in (-1, MAX_SEED + 1, 2**70):
        message = f"seed={seed} is not valid: it must be between 0 and {MAX_SEED}"
        with pytest.raises(UserError, match=message):
            parse_arguments(["--seed", str(seed)])
        with pytest.raises(UserError, match=message):
            parse_words([ComposeOptions], ["--model=x", "--output=a.mid", f"--seed={seed}"], "training.compose")


def test_help_is_in_groups():
    text = Parser(CLASSES, "training.train").format_help()
    assert [line for line in text.splitlines() if line.endswith(":") and " " not in line] == [
        *("options:", "training:", "saving:", "sharing:", "model:", "data:")
    ]


@pytest.mark.parametrize("folder", sorted(RELEASED.glob("*/recipe.yaml")), ids=lambda path: path.parent.name)
def test_a_released_recipe_builds_the_released_network(folder):
    """Whatever has become of defaults since."""
    arguments, stored = parse_arguments([str(folder)]), KRUConfig.from_pretrained(folder.parent)
    data = ("vocab_size", "input_size", "num_labels", "problem_type")
    fixed = {name: getattr(stored, name) for name in data}
    built = build_model(get_task(arguments.run.task).head, arguments.model, **fixed).config
    names = {field.name for field in dataclasses.fields(KRUConfig)} & fields_of([ModelOptions]).keys()
    assert {name: getattr(built, name) for name in names} == {name: getattr(stored, name) for name in names}
