"""The requests that hub_server.py answers: who may do what, and the calls for repositories, uploads and downloads."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_store import Proposal, Refused, Repo, User, git_oid, sha256

if TYPE_CHECKING:
    from hub_server import HubServer

DATE = "2024-01-01T00:00:00.000Z"


class Handler(BaseHTTPRequestHandler):
    """One request; routes are in :meth:`route`."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output clean; ``hub.requests`` has them."""

    def handle_request(self) -> None:
        """Read the body, route, answer."""
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.body = self.read_body()
        try:
            with self.hub.lock:
                self.hub.requests.append(f"{self.command} {unquote(url.path)}")
                self.route(url.path)
        except Refused as error:
            headers = {"X-Error-Message": error.message}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.reply(error.status, {"error": error.message}, headers)

    def read_body(self) -> bytes:
        """The request's body, sent with a length or in chunks."""
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status: int, content: Any = None, headers: Mapping[str, str] | None = None) -> None:
        """Send JSON, or bytes as they are; a HEAD request gets the headers alone."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if data is content else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def may_fail(self, step: str) -> bool:
        """Fail here if the test asked for it: raises, or cuts the connection and returns True."""
        status = self.hub.fail.pop(step, None)
        if status is None:
            return False
        if status:
            raise Refused(status, f"failure injected at {step}")
        self.close_connection = True
        return True

    # Who asks, and may they

    def user(self) -> User | None:
        """Who sent the token; an unknown token is refused."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def repo(self, kind: str, repo_id: str, *, write: bool = False, propose: bool = False) -> Repo:
        """A repository that the caller may read, write, or propose changes to."""
        user = self.user()
        repo = self.hub.repos.get((kind, repo_id))
        owner = user is not None and user.owns(repo_id.split("/")[0])
        member = user is not None and repo_id.split("/")[0] in (user.name, *user.organizations)
        if repo is None or (repo.private and not member):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if (write or propose) and user is None:
            raise Refused(401, "Invalid username or password.")
        if (write and not owner) or (propose and user is not None and not user.can_write):
            raise Refused(403, "You don't have the required permissions to write to this repository")
        return repo

    # Routes

    def route(self, path: str) -> None:
        """Find what the address means. Revisions come percent-encoded, so they are one part each."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[0] == "api":
            return self.route_api(parts[1:])
        if parts[0] == "lfs":
            return self.lfs_object(parts[1])
        kind = "dataset" if parts[0] == "datasets" else "model"
        parts = parts[1:] if kind == "dataset" else parts
        if len(parts) > 4 and parts[2] == "resolve":
            return self.resolve(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return self.lfs_batch(kind, "/".join(parts[:2]).removesuffix(".git"))
        raise Refused(404, f"no such page: {path}")

    def route_api(self, parts: list[str]) -> None:
        if parts == ["whoami-v2"]:
            return self.whoami()
        if parts == ["repos", "create"]:
            return self.create_repo()
        if parts == ["validate-yaml"]:
            return self.validate_yaml()
        if len(parts) < 3 or parts[0] not in ("models", "datasets"):
            raise Refused(404, f"no such call: {'/'.join(parts)}")
        kind, repo_id, rest = parts[0][:-1], "/".join(parts[1:3]), parts[3:]
        action, argument = (rest[0], rest[1] if len(rest) > 1 else "main") if rest else ("revision", "main")
        calls = {
            "revision": self.info,
            "tree": self.tree,
            "paths-info": self.paths_info,
            "refs": self.list_refs,
            "discussions": self.list_proposals,
            "preupload": self.preupload,
            "commit": self.commit,
            "tag": self.tag,
        }
        if action not in calls:
            raise Refused(404, f"no such call: {action}")
        return calls[action](kind, repo_id, argument)

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        role = "write" if user.can_write else "read"
        token: dict[str, Any] = {"displayName": "test", "role": role}
        if user.fine_grained:
            allowed = ["repo.content.read", *(["repo.write"] if user.can_write else [])]
            scope = {"entity": {"type": "user", "name": user.name}, "permissions": allowed}
            token = {**token, "role": "fineGrained", "fineGrained": {"global": [], "scoped": [scope]}}
        orgs = [{"name": name, "roleInOrg": role} for name in user.organizations]
        auth = {"type": "access_token", "accessToken": token}
        self.reply(200, {"type": "user", "name": user.name, "orgs": orgs, "auth": auth})

    def create_repo(self) -> None:
        user, wanted = self.user(), self.json()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        namespace = wanted.get("organization") or user.name
        repo_id, kind = f"{namespace}/{wanted['name']}", wanted.get("type") or "model"
        if not user.owns(namespace):
            raise Refused(403, f"You don't have the rights to create a {kind} under the namespace {namespace!r}")
        if (kind, repo_id) in self.hub.repos:
            raise Refused(409, f"You already created this {kind} repo")
        if self.may_fail("create"):
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.add_repo(repo_id, kind=kind, private=private)
        prefix = "datasets/" if kind == "dataset" else ""
        self.reply(200, {"url": f"{self.hub.url}/{prefix}{repo_id}", "name": repo_id})

    def validate_yaml(self) -> None:
        content = self.json()["content"]
        errors = []
        try:
            header = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
            if not isinstance(header, dict):
                errors = [{"message": "metadata must be a mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.repo(kind, repo_id)
        sha = repo.resolve(revision)
        names = [{"rfilename": name} for name in sorted(repo.commits[sha])]
        common = {"id": repo_id, "sha": sha, "private": repo.private, "siblings": names, "lastModified": DATE}
        self.reply(200, {**common, "tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False})

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        """A file as tree listings show it."""
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
        if name.endswith(self.hub.lfs):
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 128}
        return entry

    def tree(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.repo(kind, repo_id)
        files = repo.commits[repo.resolve(revision)]
        folder = urlsplit(self.path).path.split("/tree/")[1].split("/", 1)
        prefix = f"{unquote(folder[1])}/" if len(folder) > 1 else ""
        inside = {name: data for name, data in files.items() if name.startswith(prefix)}
        if prefix and not inside:
            raise Refused(404, f"{prefix} does not exist", "EntryNotFound")
        self.reply(200, [self.entry(name, data) for name, data in sorted(inside.items())])

    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.repo(kind, repo_id)
        files = repo.commits[repo.resolve(revision)]
        if "json" in self.headers.get("Content-Type", ""):
            names = self.json()["paths"]
        else:
            names = parse_qs(self.body.decode()).get("paths", [])
        found = [self.entry(name, files[name]) for name in names if name in files]
        folders = [name for name in names if any(path.startswith(f"{name}/") for path in files)]
        folder_oid = git_oid(b"folder")
        self.reply(200, found + [{"type": "directory", "path": name, "oid": folder_oid} for name in folders])

    def list_refs(self, kind: str, repo_id: str, _: str) -> None:
        repo = self.repo(kind, repo_id)

        def shown(prefix: str, refs: Mapping[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"{prefix}{n}", "targetCommit": sha} for n, sha in refs.items()]

        branches = {name: sha for name, sha in repo.refs.items() if not name.startswith("refs/pr/")}
        proposals = {name: sha for name, sha in repo.refs.items() if name.startswith("refs/pr/")}
        self.reply(
            200,
            {
                "branches": shown("refs/heads/", branches),
                "converts": [],
                "tags": shown("refs/tags/", repo.tags),
                "pullRequests": shown("", proposals),
            },
        )

    def list_proposals(self, kind: str, repo_id: str, _: str) -> None:
        repo = self.repo(kind, repo_id)
        author, status = self.query.get("author"), self.query.get("status", "all")
        found = [
            {
                "num": number,
                "title": proposal.title,
                "author": {"name": proposal.author},
                "status": proposal.status,
                "createdAt": DATE,
                "repo": {"name": repo_id, "type": kind},
                "isPullRequest": True,
            }
            for number, proposal in repo.proposals.items()
            if author in (None, proposal.author) and (status == "all" or (status == "open") == proposal.is_open)
        ]
        self.reply(200, {"discussions": found, "count": len(found), "start": 0})

    # Writing

    def repo_to_change(self, kind: str, repo_id: str, revision: str) -> Repo:
        """The repository, if the caller may open a pull request, or commit to the branch or to its own pull request."""
        propose, user = "create_pr" in self.query, self.user()
        repo = self.repo(kind, repo_id, propose=propose)
        number = revision.removeprefix("refs/pr/")
        proposal = repo.proposals.get(int(number)) if number.isdigit() else None
        own = proposal is not None and user is not None and user.can_write and proposal.author == user.name
        return repo if propose or own else self.repo(kind, repo_id, write=True)

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.repo_to_change(kind, repo_id, revision)
        if self.may_fail("preupload"):
            return
        there = repo.commits[repo.resolve(revision)]
        answers = []
        for wanted in self.json()["files"]:
            lfs = wanted["path"].endswith(self.hub.lfs)
            old = there.get(wanted["path"])
            oid = None if old is None else sha256(old) if lfs else git_oid(old)
            mode = "lfs" if lfs else "regular"
            answers.append({"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": answers})

    def lfs_batch(self, kind: str, repo_id: str) -> None:
        self.repo(kind, repo_id, propose=True)
        answers = []
        for wanted in self.json()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                verify = {"href": f"{self.hub.store}/verify", "header": {}}
                upload = {"href": f"{self.hub.store}/{wanted['oid']}", "header": {}}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        self.reply(200, {"transfer": "basic", "objects": answers})

    def lfs_object(self, oid: str) -> None:
        """Upload, verify or download one object of the LFS store."""
        if oid == "verify":
            wanted = self.json()
            if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
                raise Refused(404, "the object has not been uploaded")
            return self.reply(200, {})
        if self.command == "PUT":
            if self.may_fail("lfs_put"):
                return None
            if sha256(self.body) != oid:
                raise Refused(400, "the content does not have that SHA-256")
            self.hub.objects[oid] = self.body
            return self.reply(200, b"")
        if oid not in self.hub.objects:
            raise Refused(404, "no such object")
        return self.reply(200, self.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        """All or nothing: the new tree is built first, and becomes a commit only when every line of it is good."""
        propose = "create_pr" in self.query
        repo = self.repo_to_change(kind, repo_id, revision)
        if self.may_fail("commit"):
            return
        head = repo.resolve(revision)
        files = dict(repo.commits[head])
        title = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", head) != head:
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                files = {n: d for n, d in files.items() if not n.startswith(value["path"].rstrip("/") + "/")}
        number, user = len(repo.proposals) + 1, self.user()
        if propose and user is not None:
            repo.proposals[number] = Proposal(user.name, title)
        sha = repo.commit(f"refs/pr/{number}" if propose else revision, files)
        if self.may_fail("commit_answer"):
            return
        prefix = "datasets/" if kind == "dataset" else ""
        address = f"{self.hub.url}/{prefix}{repo_id}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{address}/commit/{sha}", "hookOutput": ""}
        self.reply(200, {**answer, **({"pullRequestUrl": f"{address}/discussions/{number}"} if propose else {})})

    def tag(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.repo(kind, repo_id, write=True)
        if self.may_fail("tag"):
            return None
        if self.command == "DELETE":
            repo.tags.pop(revision, None)
            return self.reply(200, {})
        name = self.json()["tag"]
        if name in repo.tags:
            raise Refused(409, f"Tag {name} already exists")
        repo.tags[name] = repo.resolve(revision)
        return self.reply(201, {})

    # Reading

    def resolve(self, kind: str, repo_id: str, revision: str, name: str) -> None:
        """A file: regular ones come at once, LFS ones by a redirection to the store, as on the real Hub."""
        repo = self.repo(kind, repo_id)
        sha = repo.resolve(revision)
        headers = {"X-Repo-Commit": sha}
        data = repo.commits[sha].get(name)
        if data is None:
            self.reply(404, b"Entry not found", {**headers, "X-Error-Code": "EntryNotFound"})
            return
        if not name.endswith(self.hub.lfs):
            self.reply(200, data, {**headers, "ETag": f'"{git_oid(data)}"', "Accept-Ranges": "bytes"})
            return
        oid = sha256(data)
        self.hub.objects.setdefault(oid, data)
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "ETag": f'"{oid}"'}
        self.reply(302, b"", {**headers, **linked, "Location": f"{self.hub.store}/{oid}"})
