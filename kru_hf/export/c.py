"""``--format c``: the runtime's sources, and a model for it as a file and as a header."""

import shutil
import struct
from pathlib import Path

SOURCES = ("kru_run.h", "kru_run.c", "kru_run.inc")


def header(data: bytes) -> str:
    """C source that holds the bytes of a weight file, at an address that 8 divides."""
    words = struct.unpack(f"<{-(-len(data) // 8)}Q", data + bytes(-len(data) % 8))
    lines = [", ".join(f"{word:#x}u" for word in words[i : i + 6]) for i in range(0, len(words), 6)]
    return (
        "/* A model of kru_hf for kru_run.c: kru_open(kru_weights, KRU_WEIGHTS_BYTES, memory). */\n"
        f"#include <stdint.h>\n#define KRU_WEIGHTS_BYTES {len(data)}\n"
        "static const uint64_t kru_weights[] = {\n" + ",\n".join(lines) + "\n};\n"
    )


def export_c(data: bytes, folder: Path) -> list[Path]:
    """Write the sources, ``model.kru`` and ``weights.h`` (the same bytes); returns their paths."""
    for name in SOURCES:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    (folder / "model.kru").write_bytes(data)
    (folder / "weights.h").write_text(header(data))
    return [folder / name for name in (*SOURCES, "model.kru", "weights.h")]
