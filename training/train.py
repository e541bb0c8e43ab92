"""Train a model: `accelerate launch -m training.train [RECIPE.yaml] [--option value …]`, or with `python -m`.

Without arguments: a character language model on the embedded text `python_docs`.
"""

import signal
import sys

import transformers

from .common import processes
from .common.errors import Interrupted, UserError
from .common.stopping import StopRequest
from .loop.accelerate_loop import TrainingLoop
from .loop.arguments import parse_arguments
from .loop.driver import Driver
from .loop.run import run


def main(argv: list[str] | None = None, driver: type[Driver] = TrainingLoop, program: str = "training.train") -> int:
    """Command line of `program`; returns the exit code: 0, 1 for errors, 128 + the signal that stopped it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    transformers.utils.logging.disable_progress_bar()  # bars for single files would break the training's own
    again = f"resume with: {processes.how_to_resume(argv, program)}"
    with StopRequest() as stop:  # while the reason is said too: launchers send a second signal
        try:
            run(parse_arguments(argv, program), stop, driver)
        except UserError as error:
            processes.say(error, again if isinstance(error, Interrupted) else "")
            return error.exit_code
        except KeyboardInterrupt as stopped:
            processes.say(UserError("stopped; what was saved is whole", shared=True), again)
            return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
        except RuntimeError as error:
            if not processes.lost_others(error):
                raise
            processes.say(UserError(processes.what_was_lost(error)), again)
            return 1
        finally:
            with processes.unheard():
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
