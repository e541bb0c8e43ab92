"""Publish a trained folder on the Hub: `python -m training.publish --model FOLDER --repo_id ME/NAME [options]`."""

from __future__ import annotations

import dataclasses
import sys

from transformers.utils.logging import disable_progress_bar

from .common.errors import UserError
from .options.parser import parse_words
from .records.publishing import PublishOptions, publish_folder, said


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    disable_progress_bar()
    try:
        (options,) = parse_words([PublishOptions], list(sys.argv[1:] if argv is None else argv), "training.publish")
        values = dataclasses.asdict(options)
        print(said(publish_folder(values.pop("model"), values.pop("repo_id"), **values)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
