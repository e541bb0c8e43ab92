"""Train a model with Lightning: `python -m training.train_lightning [RECIPE.yaml] [--option value …]`.

Options, recipes, checkpoints and the folder of a run are those of `training.train`; `torchrun --nproc_per_node N -m …`
starts several processes.
"""

import sys

from . import train
from .common import processes
from .common.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 1 for errors, 130/143 after Ctrl-C/SIGTERM."""
    try:
        from .loop.lightning_module import LightningLoop
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] != "lightning":
            raise
        processes.say(UserError('Lightning is not installed: pip install -e ".[lightning]"'))
        return 1
    return train.main(argv, LightningLoop, "training.train_lightning")


if __name__ == "__main__":
    sys.exit(main())
