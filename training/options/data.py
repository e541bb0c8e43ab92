"""Options of the data; the same for every task."""

from dataclasses import dataclass, fields
from functools import partial

from ..common.errors import UserError
from .fields import NEVER, Is, Options, option

data = partial(option, group="data")
OF_A_SET = {"dataset": Is.ON}


@dataclass
class DataOptions(Options):
    """Where data comes from."""

    dataset: str | None = data(
        None,
        "A built-in name, a file, a folder of train/validation/test files or folders, or a Hub id.",
        off=NEVER,
        allowed=("a built-in name, a file, a folder or a Hub id", bool),
    )
    dataset_config: str | None = data(None, "Configuration name of a Hub data set.", only=OF_A_SET)
    dataset_revision: str | None = data(None, "Revision (tag, branch or commit) of it.", only=OF_A_SET)
    text_column: str = data("text", "Column that holds the text, of a table or a data set of the Hub.", only=OF_A_SET)

    def hub_options(self) -> dict[str, str]:
        """The options of a data set of the Hub that are given, for a record."""
        names = [field.name for field in fields(self) if field.name != "dataset"]
        return {name: getattr(self, name) for name in names if getattr(self, name) not in (None, "text")}

    def refuse_hub_options(self, texts: bool = False) -> None:
        """For data that are not the Hub's.

        Args:
            texts: whether they may be tables of texts, for which `text_column` has a meaning.

        Raises:
            UserError: an option that only a data set of the Hub has; it would be recorded, and have no effect.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("dataset", *(["text_column"] if texts else [])) and value != field.default:
                raise UserError(
                    f"{field.name}={value!r} is for a data set of the Hub, but dataset={self.dataset!r} is not one"
                )

    def refuse_text_column(self, columns: str) -> None:
        """For data of the Hub without texts, which are read from `columns`.

        Raises:
            UserError: `text_column` is given; it would have no effect.
        """
        if self.text_column != "text":
            raise UserError(
                f"text_column={self.text_column!r} is for texts, but dataset={self.dataset!r} is read from {columns}"
            )
