"""A Hub to test against: the protocol that huggingface_hub, transformers and datasets speak, over loopback, in memory.

    with HubServer() as hub:
        hub.add_user("me", token="hf_me")
        api = huggingface_hub.HfApi(endpoint=hub.url, token="hf_me")

Clients in other processes get ``HF_ENDPOINT=hub.url`` in their environment. What a request may do follows the real Hub:
401 without or with an unknown token, 403 without the right, 404 with ``X-Error-Code``, 409 for what exists, 412 for a
parent commit that is no longer the newest. ``hub.fail[step] = status`` makes the next request of a step fail; status 0
cuts the connection after the request has been read. The step "commit_answer" fails after the commit has been made.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer

from hub_requests import Handler
from hub_store import Repo, Tree, User


class HubServer:
    """The server and what it holds; ``url`` is its address.

    Args:
        lfs: ends of the names of files that go through LFS, as a repository's .gitattributes says on the real Hub.
    """

    def __init__(self, lfs: tuple[str, ...] = ()) -> None:
        self.lfs = lfs
        self.users: dict[str, User] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.fail: dict[str, int] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add_user(
        self,
        name: str,
        token: str,
        *,
        can_write: bool = True,
        organizations: tuple[str, ...] = (),
        fine_grained: bool = False,
    ) -> None:
        """Register an account with its token."""
        self.users[token] = User(name, can_write, organizations, fine_grained)

    def add_repo(
        self, repo_id: str, files: Mapping[str, bytes] | None = None, *, kind: str = "model", private: bool = False
    ) -> Repo:
        """Put a repository there without HTTP; ``kind`` is "model" or "dataset"."""
        repo = self.repos[(kind, repo_id)] = Repo(private)
        repo.commit("main", {".gitattributes": b"", **(files or {})})
        return repo

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> Tree:
        """The tree of a revision."""
        repo = self.repos[(kind, repo_id)]
        return repo.commits[repo.resolve(revision)]

    @property
    def store(self) -> str:
        """Address of the LFS store: another host for the client, which drops its token there, as on the real Hub."""
        return f"http://localhost:{self.server.server_address[1]}/lfs"
