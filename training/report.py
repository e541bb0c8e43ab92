"""The page of results: `python -m training.report [RUN …]` adds runs to model_cards/runs.jsonl and shows what it has.

From that file it makes RESULTS.md, its pictures, the cards of the released models beside it, and the table of
README.md. A RUN is a folder of `training.train`, or one that holds such; weights are not needed. What was not run stays
blank.
"""

import argparse
import sys
from pathlib import Path

from .common.errors import UserError
from .common.lock import locked
from .common.processes import run_command
from .common.saving import write_text
from .records.cards import render_card
from .records.results_page import PAGE, overview, tables, update_readme, write_page
from .records.runs import add, entry_of, find_runs, read_runs, write_runs

MODEL_CARDS = Path(__file__).parent.parent / "model_cards"


def report(runs: list[str], folder: Path, only_runs: bool, over: str) -> str:
    """Add runs to a folder's runs.jsonl and make everything anew; returns the table of one line a task."""
    with locked(folder, "folder"):
        entries = read_runs(folder)
        for run in find_runs(runs):
            entries = add(entries, entry_of(run, folder))
        if not entries:
            raise UserError(f"folder={str(folder)!r} has no runs.jsonl: name a RUN")
        found = tables(entries, only_runs)
        write_runs(folder, entries)
        write_page(folder, found, over)
        for place in [folder / entry.released for entry in entries if entry.released]:
            if place.is_dir():
                write_text(place / "README.md", render_card(place))
        text = overview(found)
        update_readme(folder.resolve().parent / "README.md", text)
    return text


def run(argv: list[str]) -> None:
    """Report as the options say."""
    parser = argparse.ArgumentParser(prog="training.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="Folder of a run, or folder that holds runs.")
    parser.add_argument("--folder", type=Path, default=MODEL_CARDS, help=f"Where runs.jsonl and {PAGE} are.")
    parser.add_argument("--only_runs", action="store_true", help="Leave out the paper's tasks that nobody ran.")
    parser.add_argument("--over", choices=("step", "minute"), default="step", help="What the pictures go over.")
    options = parser.parse_args(argv)
    print(report(options.runs, options.folder, options.only_runs, options.over))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
