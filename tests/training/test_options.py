"""Options: read from recipes and the command line, refused where they would do nothing, and bounded."""

import dataclasses
import itertools
from itertools import pairwise
from pathlib import Path

import pytest

from kru_hf.cells import STARTS
from kru_hf.configuration_kru import ACTIVATIONS, BLOCK_TYPES, CELL_TYPES, KRUConfig
from kru_hf.frame_heads import FRAME_HEADS
from kru_hf.scan import BACKENDS
from training.common.errors import UserError
from training.compose import ComposeOptions
from training.loop.arguments import parse_arguments
from training.models.baselines import BaselineConfig
from training.models.build import build_model
from training.models.optimization import learning_rate, parameter_groups
from training.models.unitary import UnitaryKRUConfig
from training.options.data import DataOptions
from training.options.fields import MAX_SEED, NEVER, Is, fields_of
from training.options.model import ARCHITECTURES, BASELINES, ModelOptions, parse_factor_shapes
from training.options.parser import Parser, parse_words
from training.options.recipe import read_recipe
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


# ---- options that would do nothing ----


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


# ---- recipes and the command line ----


def test_every_config_field_is_an_option():
    """But what the data and its alphabet decide."""
    fixed = {"vocab_size", "input_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"}
    fixed |= {"frame_onsets"}
    own = {name for name in KRUConfig.__annotations__ if name not in ("model_type", "keys_to_ignore_at_inference")}
    assert own - fixed <= {f.name for f in dataclasses.fields(ModelOptions)}


def test_every_option_has_a_help_sentence():
    arguments = parse_arguments([])
    for part in (arguments.run, arguments.model, arguments.data, arguments.task):
        for field in dataclasses.fields(part):
            assert field.metadata["help"].endswith("."), field.name


def test_recipe_and_command_line(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("learning_rate: 1e-2\nstate_size: 36\nfactor_shapes: [[6, 6], [6, 6]]\nreadout_norm: false\n")
    arguments = parse_arguments([str(recipe), "--learning_rate", "0.5"])
    assert arguments.run.learning_rate == 0.5
    assert arguments.model.config_values() == {
        "state_size": 36,
        "factor_shapes": [[6, 6], [6, 6]],
        "readout_norm": False,
    }
    assert parse_arguments([str(recipe)]).run.learning_rate == 1e-2
    assert parse_arguments([str(recipe), "--architecture", "lstm"]).model.config_values() == {"state_size": 36}
    recipe.write_text("sequnce_length: 3\n")
    with pytest.raises(UserError, match="unknown key 'sequnce_length' .did you mean 'sequence_length'"):
        parse_arguments([str(recipe)])


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("mixed_precision: no", "mixed_precision", "no"),
        ("mixed_precision: 'no'", "mixed_precision", "no"),
        ("mixed_precision: null", "mixed_precision", None),
        ("mixed_precision:", "mixed_precision", None),
        ("use_cpu: no", "use_cpu", False),
        ("use_cpu: NO", "use_cpu", False),
        ("use_cpu: Yes", "use_cpu", True),
        ("use_cpu: on", "use_cpu", True),
        ("readout_norm: OFF", "readout_norm", False),
        ("data_license: no", "data_license", "no"),
        ("data_license: on", "data_license", "on"),
        ("data_license: 2020-01-01", "data_license", "2020-01-01"),
        ("data_license: 1:30", "data_license", "1:30"),
        ("data_license: 1_0", "data_license", "1_0"),
        ("data_license: 'null'", "data_license", "null"),
        ("max_steps: 010", "max_steps", 10),
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("learning_rate: .5", "learning_rate", 0.5),
        ("output_dir: 0x10", "output_dir", "0x10"),
        ("factor_shapes: 2x3,4x5", "factor_shapes", "2x3,4x5"),
    ],
)
def test_a_recipe_says_what_the_command_line_would(tmp_path, line, name, value):
    (tmp_path / "r.yaml").write_text(f"\ufeff{line}\n", encoding="utf-8")
    assert parse_arguments([str(tmp_path / "r.yaml")]).flat()[name] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 5\nseed: 1\nmax_steps: 5\n", "'max_steps' is given twice, in lines 1 and 3"),
        ("seed: 1\n'seed': 2\n", "'seed' is given twice, in lines 1 and 2"),
        ("factor_shapes: [[2, 03]]", "factor_shapes=.*03.* is not valid"),
        ("max_steps: 0x10\n", "max_steps.*invalid int value: '0x10'"),
        ("max_steps: {a: 1}\n", "line 1: max_steps must be a value or a list of pairs"),
        ("max_steps: !!python/name:os.system\n", "line 1: max_steps has the tag"),
        ("seed: 1\n? [a]\n: 2\n", "line 2: a key must be the name of an option"),
        ("seed: 1\n---\nseed: 2\n", "is not valid YAML: expected a single document"),
        ("- seed\n", "must be a mapping of option names to values"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        parse_arguments([str(tmp_path / "r.yaml")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "unknown option '--lerning_rate' .did you mean 'learning_rate'"),
        (["--state_siz=3"], "did you mean 'state_size'"),
        (["--learning_rate", "fast"], "learning_rate.*invalid float value"),
        (["--learning_rate", "-1"], "learning_rate=-1.0 is not valid"),
        (["--adam_beta1", "1"], "adam_beta1=1.0 is not valid"),
        (["--adam_beta2", "1"], "adam_beta2=1.0 is not valid"),
        (["--unitary_loss_coef", "-1"], "unitary_loss_coef=-1.0 is not valid"),
        (["--architecture", "transformer"], "architecture='transformer' is not valid"),
        (["--task", "chess"], "task='chess'"),
        (["--sequence_length", "0"], "sequence_length=0"),
        (["--max_steps", "0"], "max_steps=0"),
        (["nowhere.yaml"], "recipe 'nowhere.yaml' does not exist"),
        (["--factor_shapes", "7x"], "factor_shapes='7x'"),
        (["--factor_shapes", "[[2.9, 2.9], [4, 4]]"], r"factor_shapes='\[\[2.9, 2.9\], \[4, 4\]\]' is not valid"),
        (["--dataset", ""], "dataset='' is not valid"),
    ],
)
def test_bad_options(words, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(words)


def test_factor_shapes_are_read_in_both_notations():
    assert parse_factor_shapes("2x3,4X4") == parse_factor_shapes("[[2, 3], [4, 4]]") == [[2, 3], [4, 4]]


def test_learning_rate_schedule():
    run = parse_arguments(["--learning_rate", "1", "--warmup_steps", "10", "--lr_scheduler_type", "cosine"]).run
    rates = [learning_rate(step, 200, run) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(200, 200, run) == pytest.approx(0.02)
    run.lr_scheduler_type = "plateau"
    assert learning_rate(150, 200, run, plateau_scale=0.3) == pytest.approx(0.3)


def test_factors_have_their_own_rate_and_no_decay():
    model = build_model("causal_lm", ModelOptions(state_size=24, block_type="plain"), vocab_size=10)
    run = parse_arguments(["--weight_decay", "0.1", "--factor_learning_rate_scale", "0.2"]).run
    groups = parameter_groups(model, run)
    factors = {id(p) for _, p in model.recurrent_parameters()}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert {id(p) for p in groups[-1]["params"]} == factors
    assert (groups[-1]["scale"], groups[-1]["weight_decay"]) == (0.2, 0.0)
    assert all(p.ndim == 1 for p in groups[1]["params"])
    assert groups[1]["weight_decay"] == 0.0
    assert groups[0]["weight_decay"] == 0.1
    gated = build_model(
        "causal_lm", ModelOptions(cell_type="kru_lstm", state_size=24, block_type="plain"), vocab_size=10
    )
    bias = gated.model.layers[0].recurrence.bias
    assert bias.ndim == 2 and any(bias is p for p in parameter_groups(gated, run)[1]["params"])


# ---- limits ----


LAUGHS = "a: &a [lol, lol]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in pairwise("abcdefgh"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "has the alias *a"),
        ("factor_shapes: &s [[7, 7]]\nseed: *s\n", "has the alias *s"),
        ("<<: &x {seed: 1}\nb: {<<: *x}\n", "has the alias *x"),
        ("factor_shapes: " + "[" * 50_000, "nested deeper than a list of lists"),
        ("factor_shapes: " + "[" * 4 + "7" + "]" * 4, "nested deeper than a list of lists"),
        ("#" * (1 << 20) + "\n", "1,048,577 bytes; it may have 1,048,576"),
    ],
)
def test_recipes_are_small_and_flat(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_recipe(tmp_path / "a.yaml")
    assert message in str(caught.value) and "a.yaml" in str(caught.value)


NAMES = (
    "max_steps",
    "state_size",
    "parameter_budget",
    "sequence_length",
    "sample_length",
    "save_steps",
    "eval_streams",
)


@pytest.mark.parametrize("name", NAMES)
def test_whole_numbers_have_at_most_31_bits(name, tmp_path):
    (tmp_path / "a.yaml").write_text(f"{name}: {2**31}\n")
    for words in ([str(tmp_path / "a.yaml")], [f"--{name}={2**31}"], [f"--{name}={10**300}"]):
        with pytest.raises(UserError, match=rf"{name}=\d+ is not valid: it must be at most 2147483647"):
            parse_arguments(words)
    assert parse_arguments([f"--{name}=2147483647"]).flat()[name] == 2**31 - 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_train_epochs=1e300"], "num_train_epochs=1e+300 is not valid: it must be positive"),
        (["--num_threads=1025"], "num_threads=1025 is not valid: it must be at most 1024"),
        (["--task=adding", "--sequence_length=1000001"], "sequence_length=1000001 is not valid: it must be at most"),
        (["--task=copy_memory", "--test_samples=100000001"], "test_samples=100000001 is not valid"),
        (["--task=piano_roll", "--frames_per_quarter=481"], "frames_per_quarter=481 is not valid: it must be at most"),
    ],
)
def test_what_a_run_may_ask_for(words, message):
    with pytest.raises(UserError) as caught:
        parse_arguments(words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_frames", 100_001, "num_frames=100001 is not valid: it must be at most 100000"),
        ("num_frames", 10**12, "num_frames=1000000000000 is not valid: it must be at most 2147483647"),
        ("frames_per_quarter", 481, "frames_per_quarter=481 is not valid: it must be at most 480"),
    ],
)
def test_what_may_be_composed(name, value, message):
    with pytest.raises(UserError) as caught:
        parse_words([ComposeOptions], ["--model=x", "--output=a.mid", f"--{name}={value}"], "training.compose")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("kru", {"num_hidden_layers": 2 * 10**9}, "num_hidden_layers must be at most 4,096, got 2,000,000,000"),
        ("lstm", {"num_hidden_layers": 2 * 10**9}, "num_hidden_layers must be at most 4,096, got 2,000,000,000"),
        ("kru", {"state_size": 2 * 10**9}, "state_size must be at most 16,777,216, got 2,000,000,000"),
        ("gru", {"state_size": 2 * 10**9}, "state_size must be at most 16,777,216, got 2,000,000,000"),
        ("lstm", {"state_size": 10**7}, "state_size=10000000: the model has 80"),
        ("orthogonal", {"state_size": 10**7}, "do not fit into this machine's memory"),
    ],
)
def test_models_that_are_too_large_are_not_built(architecture, options, message):
    with pytest.raises(UserError) as caught:
        build_model("causal_lm", ModelOptions(architecture=architecture, **options), vocab_size=100)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_task_has_whole_numbers_that_can_be_bounded():
    """A task's own options go the same way as those of a run."""
    for task in ("char_lm", "adding", "piano_roll", "pixel_mnist"):
        options = get_task(task).Options
        with pytest.raises(UserError, match="at most 2147483647"):
            name = next(f for f in ("sequence_length", "eval_batch_size") if hasattr(options, f))
            parse_words([options], [f"--{name}={2**31}"], "training.train")
