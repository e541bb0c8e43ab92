"""How records are shown: values as text of Markdown, tables, and the templates beside this file."""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Undefined
from markupsafe import Markup

from ..common.files import one_line

METRICS = {
    "loss": "Cross-entropy (nats)",
    "bpc": "Bits per character",
    "nll_per_frame": "Negative log-likelihood per frame (nats)",
    "onset_nll_per_frame": "of its onsets, beside it (nats)",
    "accuracy": "Accuracy",
    "f1": "F1",
    "mse": "Mean squared error",
}
# What Markdown, HTML, Jinja and KaTeX read as more than a letter; an underscore only at the edge of a word.
_MARKUP = re.compile(r"[\\`*\[\]{}|~$@<>&]|(?<=:)/(?=/)|(?<=www)\.|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def shown(value: Any) -> str:
    """A value as a card or page prints it: blank for None, at most five significant digits, text as it is.

    Text becomes one line of Markdown that shows it unchanged, also within a table; `Markup` is Markdown already.
    """
    if value is None or isinstance(value, Undefined):
        return ""
    if isinstance(value, Markup):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else str(value)
    return _MARKUP.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), one_line(value))


def table(head: Iterable[str], lines: Iterable[Sequence[Any]]) -> Markup:
    """A Markdown table."""
    names = list(head)
    return Markup("\n".join(f"| {' | '.join(map(shown, row))} |" for row in [names, ["---"] * len(names), *lines]))


# Every expression of a template is printed by `shown`.
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    finalize=shown,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
