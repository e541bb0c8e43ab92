"""A character language model with your own Trainer: `python -m examples.lightning_char_lm [--option value …]`."""

import sys

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from training.loop.arguments import parse_arguments
from training.loop.lightning_module import TaskModule


def main(words: list[str], **settings) -> pl.Trainer:
    """Train with the recipe char_lm and these options; `settings` are those of the Trainer."""
    module = TaskModule(parse_arguments(["char_lm", *words]))
    best = ModelCheckpoint(monitor="validation_bpc")
    trainer = pl.Trainer(**{"max_steps": 1500, "val_check_interval": 250, "callbacks": [best], **settings})
    trainer.fit(module)
    trainer.test(module, ckpt_path="best")
    module.model.save_pretrained(f"{trainer.default_root_dir}/model")  # loads with AutoModelForCausalLM
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
