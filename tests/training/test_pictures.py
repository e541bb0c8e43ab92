"""Pictures of every mode and form, on one scale for the whole data set, and what is held out of their rows."""

import io

import numpy as np
import pytest
from datasets import Array2D, Dataset, Features, Image, Value
from PIL import Image as Pillow

from training.common.errors import UserError
from training.data import pixels
from training.data.pixels import held_out, load_pictures
from training.data.splits import Parts
from training.options.data import DataOptions
from training.tasks import get_task

LEVELS = np.add.outer(np.arange(4), np.arange(4)).astype(np.uint8) * 40  # (4, 4): 7 levels from 0 to 240
FLAT = LEVELS.ravel()
DARK, BRIGHT = np.zeros_like(LEVELS), np.full_like(LEVELS, 255)


def grey(palette: list[int]) -> Pillow.Image:
    """LEVELS through a palette of greys."""
    picture = Pillow.fromarray((LEVELS // 40).astype(np.uint8), "P")
    picture.putpalette([level for entry in palette for level in (entry, entry, entry)])
    return picture


def file_bytes(picture: Pillow.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def load(folder, column: str, train: list, test: list | None = None, features: Features | None = None):
    """The pictures of a folder with these cells in train, and in test."""
    for split, cells in (("train", train), ("test", test or train)):
        rows = {column: cells, "label": [row % 2 for row in range(len(cells))]}
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return load_pictures(DataOptions(dataset=str(folder)))


PALETTE = grey([0, 40, 80, 120, 160, 200, 240])
TRANSPARENT = grey([9] * 7)
TRANSPARENT.info["transparency"] = bytes([0, 40, 80, 120, 160, 200, 240])
MODES = {
    "L": (Pillow.fromarray(LEVELS), FLAT, 255),
    "RGB": (Pillow.fromarray(np.dstack([LEVELS] * 3)), FLAT, 255),
    "P": (PALETTE, FLAT, 255),
    "1": (Pillow.fromarray(LEVELS > 100), (FLAT > 100) * 255, 255),
    "CMYK": (Pillow.fromarray(np.dstack([DARK] * 3 + [255 - LEVELS]), "CMYK"), FLAT, 255),
    "I;16": (Pillow.fromarray(LEVELS.astype(np.uint16) * 257), FLAT.astype(np.uint16) * 257, 65535),
    "I": (Pillow.fromarray(LEVELS.astype(np.int32) * 257), FLAT.astype(np.uint16) * 257, 65535),
    "F": (Pillow.fromarray(LEVELS.astype(np.float32) / 256), FLAT.astype(np.float32) / 256, 1),
    "LA": (Pillow.fromarray(np.dstack([DARK, LEVELS]), "LA"), FLAT, 255),
    "RGBA of black ink": (Pillow.fromarray(np.dstack([DARK] * 3 + [LEVELS]), "RGBA"), FLAT, 255),
    "RGBA of white ink": (Pillow.fromarray(np.dstack([BRIGHT] * 3 + [LEVELS]), "RGBA"), FLAT, 255),
    "RGBA without transparency": (Pillow.fromarray(np.dstack([LEVELS] * 3 + [BRIGHT]), "RGBA"), FLAT, 255),
    "transparent P": (TRANSPARENT, FLAT, 255),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_keeps_its_levels(tmp_path, mode):
    picture, expected, white = MODES[mode]
    cells = [{"bytes": file_bytes(picture, "TIFF" if mode in ("F", "CMYK", "I") else "PNG"), "path": None}] * 12
    found = load(tmp_path, "image", cells)
    assert found.white == white and len(found.splits["train"]) == 10
    assert found.pixels["train"].dtype == (np.float32 if mode == "F" else np.uint16 if white > 255 else np.uint8)
    for split in found.pixels:
        assert (found.pixels[split] == expected).all()


FORMS = {
    "an image column": ([Pillow.fromarray(LEVELS)] * 12, Features({"image": Image(), "label": Value("int8")})),
    "bytes": ([file_bytes(Pillow.fromarray(LEVELS))] * 12, None),
    "rows of pixels": ([LEVELS.tolist()] * 12, None),
    "rows with a channel": ([LEVELS[..., None].tolist()] * 12, None),
    "a channel of rows": ([LEVELS[None].tolist()] * 12, None),
    "an array column": (
        [LEVELS.tolist()] * 12,
        Features({"image": Array2D((4, 4), "uint8"), "label": Value("int8")}),
    ),
    "floats": ([FLAT.astype(float).tolist()] * 12, None),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_cell_is_read(tmp_path, form):
    cells, features = FORMS[form]
    found = load(tmp_path, "image", cells, features=features)
    assert (found.pixels["train"] == FLAT).all() and found.pixels["train"].dtype == np.uint8 and found.white == 255


@pytest.mark.parametrize(
    ("top", "white"), [(1, 1), (True, 1), (0.5, 1), (7, 16), (16, 16), (17, 255), (255.0, 255), (300, 65535)]
)
def test_the_scale_is_that_of_the_largest_value_of_all_parts(tmp_path, top, white):
    dim = type(top)(0)
    found = load(tmp_path, "pixels", [[dim, dim]] * 12, [[dim, top]] * 3)
    assert found.white == white
    task_class = get_task("pixel_mnist")
    task = task_class(task_class.Options(), DataOptions(dataset=str(tmp_path)))
    task.load()
    assert task.batch("test", np.array([0])).inputs["input_values"].flatten().tolist() == pytest.approx(
        [0, top / white]
    )
    assert task.notes(("test",))[-1:] == (
        [f"the largest value of a pixel is {white}"] if white != 255 else task.notes(())
    )


def test_8_and_16_bits_share_a_scale(tmp_path):
    cells = [{"bytes": file_bytes(MODES[mode][0])} for mode in ("L", "I;16")] * 6
    found = load(tmp_path, "image", cells)
    assert found.white == 65535 and (found.pixels["test"] == FLAT.astype(np.uint16) * 257).all()


BOTH = Pillow.fromarray(np.dstack([LEVELS] * 3 + [LEVELS]), "RGBA")
ONE = {"bytes": file_bytes(Pillow.fromarray(LEVELS))}


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([{"bytes": file_bytes(BOTH)}] * 12, "colours and opacity of the pictures both vary"),
        ([ONE, ONE, {"bytes": None, "path": None}], "column image: row 2 is empty"),
        ([ONE, {"bytes": b"no picture"}], "row 1 cannot be read as a picture"),
        ([ONE, {"bytes": None, "path": "nowhere.png"}], "row 1 cannot be read as a picture"),
        ([ONE, {"bytes": file_bytes(Pillow.new("L", (2, 2)))}], "must all have one size, and row 1 differs"),
        ([[1, 2], None], "row 1 is empty"),
        ([[[1, 2], [3, 4]], [[1, 2], [3, None]]], "row 1: a pixel is nan"),
        ([[1, 2], [1]], "must all have one size, and row 1 differs"),
        ([[1, 2], [1, -1]], "row 1: a pixel is -1, and must be a number from 0 to 1, 16, 255 or 65535"),
        ([[1.0, 2.0], [1.0, float("nan")]], "row 1: a pixel is nan"),
        ([[1, 2], [1, 65536]], "row 1: a pixel is 65536"),
        ([["a", "b"]] * 4, "pixels must be numbers, not string"),
        ([np.zeros((2, 2, 3), int).tolist()] * 4, r"must be \(height, width\) or \(pixels,\) numbers, not \(2, 2, 3\)"),
        (["a.png"] * 4, "must be a list of numbers or the bytes of a file, not string"),
        ([7] * 4, "must be a list of numbers or the bytes of a file, not int64"),
        ([[]] * 4, r"not \(0,\)"),
    ],
)
def test_what_is_no_picture_is_named_with_its_row(tmp_path, cells, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, "image", cells)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "has no train.arrow, .*; it has nothing"),
        ({"text": ["a", "b"]}, "must have the columns label and pixels"),
        ({"pixels": [[0, 1]] * 2, "label": [0.5, 1.5]}, "column label: labels must be whole numbers, got 0.5 in row 0"),
        ({"pixels": [[0, 1]] * 2, "label": ["0", "1"]}, "column label: labels must be whole numbers, got '0' in row 0"),
        ({"pixels": [[0, 1]] * 2, "label": [1, None]}, "column label: labels must be whole numbers, got None in row 1"),
        ({"pixels": [[0, 1]] * 8, "label": [-1, 0] * 4}, "train: labels must be 0 … 0, as in training"),
        ({"pixels": [], "label": []}, "train' is empty"),
    ],
)
def test_tables_without_pictures_or_labels_are_refused(tmp_path, columns, message):
    for split in ("train", "test") if columns else ():
        Dataset.from_dict(columns).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match=message):
        load_pictures(DataOptions(dataset=str(tmp_path)))


# ---- held out rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [["validation"], ["test"], ["validation", "test"]])
def test_every_class_is_in_every_part_whatever_the_order_of_the_rows(missing):
    labels = np.repeat([0, 1, 2, 3], [480, 24, 5, 1])  # sorted, and of very different sizes
    parts = Parts("it", {part: None for part in ("train", "validation", "test") if part not in missing})
    places = held_out(parts, labels, 16)
    assert list(places) == ["train", *missing]
    assert sorted(np.concatenate([*places.values()])) == list(range(len(labels)))
    for part in missing:
        assert np.bincount(labels[places[part]], minlength=4).tolist() == [40, 2, 1, 0]
    again = held_out(Parts("it", {"train": None, "test": None}), labels, 16)["validation"]
    assert np.array_equal(again, held_out(Parts("it", {"train": None, "test": None}), labels, 16)["validation"])


def test_mnist_keeps_its_last_5000_rows_and_other_data_do_not():
    rows, size = pixels.MNIST
    labels = np.arange(rows) % 10
    own = Parts("mnist", {"train": None, "test": None})
    assert held_out(own, labels, size) == {"train": slice(55_000), "validation": slice(55_000, 60_000)}
    for other, width in ((labels, 64), (labels[:-10], size), (np.sort(labels), size)):
        places = held_out(Parts("it", {"train": None, "test": None}), other, width)
        assert np.bincount(other[places["validation"]]).tolist() == [500] * 10


def test_rows_that_cannot_be_split_are_refused():
    with pytest.raises(UserError, match="no class has the 2 rows that it takes"):
        held_out(Parts("it", {"train": None, "test": None}), np.arange(5), 16)
