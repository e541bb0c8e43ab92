"""Talking to the Hub: what the caller may do, what a repository holds, and in plain words what went wrong."""

import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import Discussion, HfApi, RepoFile
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..common.errors import UserError
from ..common.files import one_line, read_json
from ..options.parser import nearest

# huggingface_hub's error derives from that of its HTTP client: httpx in 1.x, a successor from 2.x on.
ClientError: type[Exception] = HfHubHTTPError.__bases__[0]
# The Hub's identifiers of licences, as its documentation lists them.
LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma
    unknown other
"""
# Parts of letters, digits and _ . + -, joined by slashes, of what git allows; no name of a branch or of a commit.
TAG = re.compile(r"(?!(main|HEAD|refs/.*|[0-9a-fA-F]{40})$)(?!.*\.(\.|lock)?(/|$))(?!.*\.\.)\w[\w.+-]*(/\w[\w.+-]*)*")
PROPOSAL = "Publish the trained model"  # title of the pull requests, by which a later run finds its own again


@contextmanager
def explained(repo_id: str, doing: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a `UserError` that says what to do."""
    again = "nothing was half-published; run the same command again to finish"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError(f"cannot publish: HF_HUB_OFFLINE is set; unset it, and {again}") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the repository {repo_id!r} does not exist, or the token may not see it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        changed = f"{repo_id!r} was changed by someone else at the same time; run the same command again"
        reasons = {
            401: "the Hub does not accept the token; make one at the Hub's settings/tokens, then: hf auth login",
            403: forbidden(repo_id),
            409: changed,
            412: changed,
        }
        reason = reasons.get(status, f"the Hub answered {status}: {error.server_message or error}; {again}")
        raise UserError(f"cannot publish ({doing}): {reason}") from error
    except (ClientError, ConnectionError, TimeoutError, LocalEntryNotFoundError) as error:
        raise UserError(f"cannot publish ({doing}): the Hub cannot be reached ({error}); {again}") from error
    except RuntimeError as error:  # what the client makes of a failed upload of a single large file
        cause = error.__cause__ or error
        raise UserError(f"cannot publish ({doing}): the upload was interrupted ({cause}); {again}") from error
    except ValueError as error:  # the Hub does not accept the card's metadata, such as the name of the licence
        raise UserError(f"cannot publish ({doing}): {one_line(error)}") from error


def forbidden(repo_id: str) -> str:
    """What to say of a token that may not write."""
    return (
        f"the token has no permission to write to {repo_id!r}; use a token with the role 'write', a repository of your "
        "own, or --create_pr"
    )


def check_name(repo_id: str) -> None:
    """An error unless it is ME/NAME, by the rules of the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"repo_id={repo_id!r} is not valid: it must be ME/NAME ({error})") from error
    if "/" not in repo_id or len(repo_id) > 96:
        raise UserError(f"repo_id={repo_id!r} is not valid: it must be ME/NAME, of at most 96 characters")


def check_license(name: str) -> None:
    """An error unless the Hub knows a licence of that identifier."""
    known = LICENSES.split()
    if name not in known:
        raise UserError(
            f"license={name!r} is not valid: it must be an identifier of the Hub, such as apache-2.0, mit, "
            f"cc-by-4.0 or other{nearest(str(name).lower(), known)}"
        )


def check_tag(tag: str | None) -> None:
    """An error unless it is None or can be a tag."""
    if tag is not None and (len(tag.encode(errors="replace")) > 250 or not TAG.fullmatch(tag)):
        raise UserError(
            f"revision_tag={tag!r} is not valid: it must be a name such as v1.0, of letters, digits, '_', '.', '+', "
            "'-' and '/', by git's rules, and neither main, HEAD, refs/… nor the SHA of a commit"
        )


def reads_only(me: dict[str, Any]) -> bool:
    """Whether the token of a `whoami` answer can write nowhere, by its role or by its fine-grained permissions."""
    token = me.get("auth", {}).get("accessToken", {})
    scopes = token.get("fineGrained", {}).get("scoped")
    if token.get("role") == "fineGrained" and scopes is not None:
        return not any("repo.write" in scope.get("permissions", []) for scope in scopes)
    return token.get("role") == "read"


def check_access(api: HfApi, repo_id: str, private: bool = False, create_pr: bool = False) -> tuple[str, bool]:
    """Whether the caller may do what was asked, without a change to the Hub.

    Returns:
        the caller's name, and whether the repository exists.

    Raises:
        UserError: no token or one that may not write, no network, the name of someone else or of another model.
    """
    check_name(repo_id)
    if not (api.token or huggingface_hub.get_token()):
        raise UserError("there is no Hub token: run `hf auth login`, or set HF_TOKEN to a token with the role 'write'")
    with explained(repo_id, "asking who you are"):
        me = api.whoami()
        owner, name = repo_id.split("/")
        exists = api.repo_exists(repo_id)
        if create_pr and not exists:
            raise UserError(f"--create_pr needs an existing repository, and {repo_id!r} does not exist")
        if not create_pr and owner not in {me["name"], *(group["name"] for group in me.get("orgs", []))}:
            state = "is taken: it belongs to" if exists else "is in the namespace of"
            hint = f"choose {me['name']}/{name}" + (", or propose a change with --create_pr" if exists else "")
            raise UserError(f"the name {repo_id!r} {state} {owner!r}, and you are {me['name']!r}: {hint}")
        if reads_only(me):
            raise UserError(f"cannot publish: {forbidden(repo_id)}")
        if exists:
            check_other_model(api, repo_id)
        if exists and private and not api.repo_info(repo_id).private:
            raise UserError(
                f"a private repository was asked for, but {repo_id!r} exists and is public: change that there first"
            )
    return me["name"], exists


def check_other_model(api: HfApi, repo_id: str) -> None:
    """An error if the repository holds a model of another kind, which the commit would mix with this one."""
    if not api.file_exists(repo_id, "config.json"):
        return
    with tempfile.TemporaryDirectory() as folder:
        model_type = read_json(Path(api.hf_hub_download(repo_id, "config.json", local_dir=folder))).get("model_type")
    if model_type != "kru":
        raise UserError(
            f"the name {repo_id!r} is taken: it holds a model of the type {model_type!r}; choose another name"
        )


def remote_files(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    """The files of a revision by name."""
    listing = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in listing if isinstance(entry, RepoFile)}


def same(data: bytes, there: RepoFile | None) -> bool:
    """Whether the Hub holds exactly that content: by SHA-256 for LFS, by git's own name otherwise."""
    if there is None or there.size != len(data):
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def open_proposal(api: HfApi, repo_id: str, me: str) -> Discussion | None:
    """The caller's own pull request of an earlier publication, as long as it is open."""
    found = api.get_repo_discussions(repo_id, author=me, discussion_type="pull_request", discussion_status="all")
    return next((one for one in found if one.status in ("open", "draft") and one.title == PROPOSAL), None)
