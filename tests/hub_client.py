"""What tests need to talk to hub_server.py: its accounts, a client, and processes that know no other Hub."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import HubServer
from huggingface_hub import HfApi

ROOT = Path(__file__).parent.parent
LFS = (".safetensors", ".png")


@contextmanager
def served_hub() -> Iterator[HubServer]:
    """A Hub where "me" may write with one token and not with two others, and "other" is someone else."""
    with pytest.MonkeyPatch.context() as patch, HubServer(lfs=LFS) as server:
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the server speaks LFS
        server.add_user("me", "hf_me", organizations=("lab",))
        server.add_user("me", "hf_read", can_write=False)
        server.add_user("me", "hf_fine", can_write=False, fine_grained=True)
        server.add_user("other", "hf_other")
        yield server


def client(hub: HubServer, token: str | None = "hf_me") -> HfApi:
    """The real client, for this Hub."""
    return HfApi(endpoint=hub.url, token=token or False)


def environment(hub: HubServer, home: Path, **extra: str) -> dict[str, str]:
    """Environment of a process that knows this Hub only, with an empty cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH", "TRANSFORMERS_"))}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, **own, **extra}


def python(code: str, hub: HubServer, home: Path, **extra: str) -> str:
    """Run code in a process of its own, outside of the checkout; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(hub, home, **extra), cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def module(name: str, arguments: list[str], hub: HubServer, home: Path, **extra: str) -> subprocess.CompletedProcess:
    """Run a module of the checkout as its users do."""
    return subprocess.run(
        [sys.executable, "-m", name, *arguments],
        env=environment(hub, home, **extra),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
