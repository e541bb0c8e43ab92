"""Data that take long to make: made once, then read from `kru_hf` beside the Hub's cache."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from tqdm import tqdm


def cache_folder() -> Path:
    """Where the data are kept."""
    return Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "kru_hf"


def cached(key: str, make: Callable[[], dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """The columns that `make` returns, from the cache where they are under this key; a damaged file is made again."""
    path = cache_folder() / f"{key}.parquet"
    if path.is_file():
        try:
            return parquet.read_table(path, page_checksum_verification=True).to_pydict()
        except (pa.ArrowException, OSError):
            tqdm.write(f"the cache {path.name} is damaged and is built again")
    columns = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    parquet.write_table(pa.table(columns), temporary, write_page_checksum=True)
    os.replace(temporary, path)
    return columns
