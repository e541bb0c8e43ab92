"""Publish a trained folder on the Hub: `python -m training.publish --model FOLDER --repo_id ME/NAME [options]`."""

import dataclasses
import sys

from .common.processes import run_command
from .options.parser import parse_words
from .records.publishing import PublishOptions, publish_folder, said


def run(argv: list[str]) -> None:
    """Publish as the options say."""
    (options,) = parse_words([PublishOptions], argv, "training.publish")
    values = dataclasses.asdict(options)
    print(said(publish_folder(values.pop("model"), values.pop("repo_id"), **values)))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
