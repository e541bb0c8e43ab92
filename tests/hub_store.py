"""What the Hub of hub_server.py holds: accounts, repositories, pull requests, and why it refuses."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

Tree = dict[str, bytes]


class Refused(Exception):
    """An answer that is not a success: status, message and the Hub's error code."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def git_oid(data: bytes) -> str:
    """What git calls a blob of that content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    """The LFS name of that content."""
    return hashlib.sha256(data).hexdigest()


@dataclass
class Proposal:
    """A pull request; its files are the tree of ``refs/pr/<number>``."""

    author: str
    title: str
    status: str = "open"

    @property
    def is_open(self) -> bool:
        """Whether commits can still be added to it."""
        return self.status in ("open", "draft")


@dataclass
class User:
    """An account: its name, whether its token may write, the organisations it belongs to, the kind of its token."""

    name: str
    can_write: bool = True
    organizations: tuple[str, ...] = ()
    fine_grained: bool = False

    def owns(self, namespace: str) -> bool:
        """Whether the user may write to repositories of ``namespace``."""
        return self.can_write and namespace in (self.name, *self.organizations)


@dataclass
class Repo:
    """A repository: commits are whole trees; ``refs`` holds branches and pull requests by name."""

    private: bool = False
    commits: dict[str, Tree] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    proposals: dict[int, Proposal] = field(default_factory=dict)

    def commit(self, ref: str, tree: Tree) -> str:
        """Make ``tree`` the newest commit of ``ref``."""
        sha = hashlib.sha1(f"{len(self.commits)} {ref} {sorted(tree)}".encode()).hexdigest()
        self.commits[sha] = tree
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """The commit that a branch, tag, pull request or commit name means."""
        sha = self.refs.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha
