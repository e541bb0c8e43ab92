"""A Hub in memory, over loopback: what huggingface_hub, transformers and datasets ask of it, its refusals and failures.

Answers follow the real Hub: 401 without or with an unknown token, 403 without the right, 404 with ``X-Error-Code``, 409
for what exists, 412 for a parent commit that is not the newest. ``hub.fail[step] = status`` makes the next request of a
step (a name in ROUTES) fail; status 0 cuts the connection; "commit_answer" fails after the commit has been made.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from huggingface_hub import HfApi

ROOT = Path(__file__).parent.parent
LFS = (".safetensors", ".png")  # what is uploaded through LFS, as by .gitattributes on the real Hub
DATE = "2024-01-01T00:00:00.000Z"
# Accounts by token: name, and role of the token.
USERS = {
    "hf_me": ("me", "write"),
    "hf_read": ("me", "read"),
    "hf_fine": ("me", "fineGrained"),
    "hf_other": ("other", "write"),
}
MEMBERS = {"me": ("me", "lab"), "other": ("other",)}  # whose repositories an account may change
REPO, REVISION = "/api/(?P<kind>model|dataset)s/(?P<repo_id>[^/]+/[^/]+)", "(?P<revision>[^/]+)"
PAGE = "/(?P<kind>datasets/)?(?P<repo_id>[^/]+/[^/]+)"
ROUTES = {
    "whoami": "/api/whoami-v2",
    "create": "/api/repos/create",
    "validate": "/api/validate-yaml",
    "info": f"{REPO}(/revision/{REVISION})?",
    "tree": f"{REPO}/tree/{REVISION}(/(?P<folder>.+))?",
    "paths": f"{REPO}/paths-info/{REVISION}",
    "refs": f"{REPO}/refs",
    "proposals": f"{REPO}/discussions",
    "preupload": f"{REPO}/preupload/{REVISION}",
    "commit": f"{REPO}/commit/{REVISION}",
    "tag": f"{REPO}/tag/{REVISION}",
    "lfs_batch": f"{PAGE}[.]git/info/lfs/objects/batch",
    "lfs_put": "/lfs/(?P<oid>.+)",
    "resolve": f"{PAGE}/resolve/{REVISION}/(?P<name>.+)",
}


class Refused(Exception):
    """An answer that is not a success: status, message and the Hub's error code."""


def oid_of(data: bytes, lfs: bool = False) -> str:
    """What git or LFS calls that content."""
    return hashlib.sha256(data).hexdigest() if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """Commits are whole trees; `refs` has branches and pull requests, `proposals` author, title and status of these."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    proposals: dict[int, list[str]] = field(default_factory=dict)

    def commit(self, ref: str, tree: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {ref} {sorted(tree)}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = tree, sha
        return sha

    def resolve(self, revision: str | None) -> str:
        sha = self.refs.get(revision or "main") or self.tags.get(revision or "") or revision or ""
        if sha not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


class Hub(ThreadingHTTPServer):
    """The server and what it holds."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.fail: dict[str, int] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, kind: str = "model", private=False) -> Repo:
        repo = self.repos[(kind, repo_id)] = Repo(private)
        repo.commit("main", {".gitattributes": b"", **(files or {})})
        return repo

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[("model", repo_id)]
        return repo.commits[repo.resolve(revision)]


class Handler(BaseHTTPRequestHandler):
    """One request: the method named in ROUTES returns the answer's JSON, or bytes."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        hub, url = self.server, urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.body = self.read_body()
        self.status, self.extra = 200, {}
        with hub.lock:
            hub.requests.append(f"{self.command} {unquote(url.path)}")
            try:
                content = self.answer(url.path)
            except Refused as error:
                self.status, message, *code = error.args
                self.extra |= {"X-Error-Message": message, **({"X-Error-Code": code[0]} if code else {})}
                content = {"error": message}
            if not self.status:
                self.close_connection = True
                return
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/octet-stream" if data is content else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in self.extra.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed; `hub.requests` has them."""

    def answer(self, path: str) -> Any:
        for step, pattern in ROUTES.items():
            if found := re.fullmatch(pattern, path):
                words = {name: unquote(value) if value else None for name, value in found.groupdict().items()}
                if "kind" in words:
                    words["kind"] = "dataset" if (words["kind"] or "").startswith("dataset") else "model"
                self.may_fail(step)
                content = getattr(self, step)(**words)
                self.may_fail(f"{step}_answer")
                return content
        raise Refused(404, f"no such page: {path}")

    def may_fail(self, step: str) -> None:
        if step in self.server.fail:
            raise Refused(self.server.fail.pop(step), f"failure injected at {step}")

    def read_body(self) -> bytes:
        """The request's body, sent with a length or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # Who asks, and may they

    def user(self) -> tuple[str, str] | None:
        """Name and role of who sent the token; an unknown token is refused."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and token not in USERS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return USERS.get(token)

    def repo(self, kind: str, repo_id: str, write: str | None = None) -> Repo:
        """A repository that the caller may read, or whose revision `write` it may change or propose to change."""
        repo, (name, role) = self.server.repos.get((kind, repo_id)), self.user() or (None, "")
        member = repo_id.split("/")[0] in MEMBERS.get(name or "", ())
        if repo is None or (repo.private and not member):
            raise Refused(404 if name else 401, "Repository not found", "RepoNotFound")
        number = (write or "").removeprefix("refs/pr/")
        own = number.isdigit() and repo.proposals[int(number)][0] == name
        if write and not (role == "write" and (member or own or "create_pr" in self.query)):
            raise Refused(403 if name else 401, "You don't have the required permissions to write to this repository")
        return repo

    def whoami(self) -> Any:
        name, role = self.user() or (None, "")
        if name is None:
            raise Refused(401, "Invalid username or password.")
        scope = {"entity": {"type": "user", "name": name}, "permissions": ["repo.content.read"]}
        token = {"displayName": "test", "role": role}
        if role == "fineGrained":
            token["fineGrained"] = {"global": [], "scoped": [scope]}
        orgs = [{"name": other, "roleInOrg": role} for other in MEMBERS[name] if other != name]
        return {"type": "user", "name": name, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}

    def create(self) -> Any:
        (name, role), wanted = self.user() or ("", ""), json.loads(self.body)
        repo_id, kind = f"{wanted.get('organization') or name}/{wanted['name']}", wanted.get("type") or "model"
        if role != "write" or repo_id.split("/")[0] not in MEMBERS[name]:
            raise Refused(403, f"You don't have the rights to create {repo_id}")
        if (kind, repo_id) in self.server.repos:
            raise Refused(409, f"You already created this {kind} repo")
        self.server.add_repo(repo_id, kind=kind, private=wanted.get("visibility") == "private" or wanted.get("private"))
        return {"url": f"{self.server.url}/{repo_id}", "name": repo_id}

    def validate(self) -> Any:
        header = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        good = isinstance(header, dict) and header["license"] in ("apache-2.0", "mit")
        errors = [] if good else [{"message": '"license" must be one of [apache-2.0, mit]'}]
        self.status = 400 if errors else 200
        return {"errors": errors, "warnings": []}

    # Reading

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        """A file as listings show it."""
        lfs = {"lfs": {"oid": oid_of(data, True), "size": len(data), "pointerSize": 128}}
        common = {"type": "file", "path": name, "size": len(data), "oid": oid_of(data)}
        return common | (lfs if name.endswith(LFS) else {})

    def info(self, kind: str, repo_id: str, revision: str | None) -> Any:
        repo = self.repo(kind, repo_id)
        sha = repo.resolve(revision)
        names = [{"rfilename": name} for name in sorted(repo.commits[sha])]
        common = {"id": repo_id, "sha": sha, "private": repo.private, "siblings": names, "lastModified": DATE}
        return {**common, "tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False}

    def tree(self, kind: str, repo_id: str, revision: str, folder: str | None) -> Any:
        repo, start = self.repo(kind, repo_id), f"{folder}/" if folder else ""
        files = sorted(repo.commits[repo.resolve(revision)].items())
        found = [self.entry(name, data) for name, data in files if name.startswith(start)]
        if not found:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        return found

    def paths(self, kind: str, repo_id: str, revision: str) -> Any:
        repo, text = self.repo(kind, repo_id), self.body.decode()
        names = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        files = repo.commits[repo.resolve(revision)]
        folders = [name for name in names if any(path.startswith(f"{name}/") for path in files)]
        found = [self.entry(name, files[name]) for name in names if name in files]
        return found + [{"type": "directory", "path": name, "oid": oid_of(b"folder")} for name in folders]

    def refs(self, kind: str, repo_id: str) -> Any:
        repo = self.repo(kind, repo_id)
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in repo.tags.items()]
        return {"branches": [], "converts": [], "tags": tags, "pullRequests": []}

    def proposals(self, kind: str, repo_id: str) -> Any:
        found = [
            {"num": number, "title": title, "author": {"name": author}, "status": status, "createdAt": DATE,
             "repo": {"name": repo_id, "type": kind}, "isPullRequest": True}
            for number, (author, title, status) in self.repo(kind, repo_id).proposals.items()
            if self.query.get("author") in (None, author)
        ]  # fmt: skip
        return {"discussions": found, "count": len(found), "start": 0}

    def resolve(self, kind: str, repo_id: str, revision: str, name: str) -> bytes:
        repo = self.repo(kind, repo_id)
        sha = repo.resolve(revision)
        self.extra = {"X-Repo-Commit": sha}
        if name not in repo.commits[sha]:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data = repo.commits[sha][name]
        self.extra |= {"ETag": f'"{oid_of(data, name.endswith(LFS))}"', "Accept-Ranges": "bytes"}
        return data

    # Writing

    def preupload(self, kind: str, repo_id: str, revision: str) -> Any:
        repo, answers = self.repo(kind, repo_id, revision), []
        there = repo.commits[repo.resolve(revision)]
        for name in (wanted["path"] for wanted in json.loads(self.body)["files"]):
            oid = oid_of(there[name], name.endswith(LFS)) if name in there else None
            mode = "lfs" if name.endswith(LFS) else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, kind: str, repo_id: str) -> Any:
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            wanted["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> bytes:
        assert oid_of(self.body, True) == oid
        self.server.objects[oid] = self.body
        return b""

    def commit(self, kind: str, repo_id: str, revision: str) -> Any:
        """All or nothing: the new tree is built first, and becomes a commit when every line of it is good."""
        repo = self.repo(kind, repo_id, revision)
        head = repo.resolve(revision)
        files = dict(repo.commits[head])
        lines = [json.loads(line) for line in self.body.splitlines()]
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header" and value.get("parentCommit", head) != head:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        address, answer = f"{self.server.url}/{repo_id}", {}
        if "create_pr" in self.query:
            number = len(repo.proposals) + 1
            repo.proposals[number] = [(self.user() or ("",))[0], lines[0]["value"]["summary"], "open"]
            revision, answer = f"refs/pr/{number}", {"pullRequestUrl": f"{address}/discussions/{number}"}
        sha = repo.commit(revision, files)
        return {"success": True, "commitOid": sha, "commitUrl": f"{address}/commit/{sha}", "hookOutput": "", **answer}

    def tag(self, kind: str, repo_id: str, revision: str) -> Any:
        repo, name = self.repo(kind, repo_id, revision), json.loads(self.body)["tag"]
        if name in repo.tags:
            raise Refused(409, f"Tag {name} already exists")
        repo.tags[name] = repo.resolve(revision)
        return {}


# What tests need to talk to it


@contextmanager
def served_hub() -> Iterator[Hub]:
    """A Hub of its own."""
    with pytest.MonkeyPatch.context() as patch, Hub() as hub:
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the server speaks LFS
        threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
        yield hub
        hub.shutdown()


def client(hub: Hub, token: str | None = "hf_me") -> HfApi:
    """The real client, for this Hub."""
    return HfApi(endpoint=hub.url, token=token or False)


def run(words: list[str], hub: Hub, home: Path, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess[str]:
    """A Python process that knows this Hub only, with an empty cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH", "TRANSFORMERS_"))}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], env={**kept, **own, **extra}, cwd=cwd, capture_output=True, text=True
    )


def python(code: str, hub: Hub, home: Path, **extra: str) -> str:
    """Run code outside of the checkout; its standard output."""
    done = run(["-c", code], hub, home, home, **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def module(name: str, arguments: list[str], hub: Hub, home: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a module of the checkout as its users do."""
    return run(["-m", name, *arguments], hub, home, **extra)
