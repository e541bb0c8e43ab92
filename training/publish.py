"""Publish a trained folder on the Hub: `python -m training.publish --model FOLDER --repo_id ME/NAME [options]`.

The folder is checked and everything is put together first. Then one commit brings weights, config, modelling code,
tokenizer, card and results at once, so nothing is ever half-published: after a failure, the same command again
finishes. What is already there in the same form is not uploaded twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import HfArgumentParser, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_relative_import_files

import kru_hf

from .cards import missing_fields, read_json, render_card
from .errors import UserError

PACKAGE = Path(kru_hf.__file__).parent
WEIGHTS = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
RESULT_FILES = ("all_results.json", "log_history.json", "training.json", "comparison.json", "learning_curve.png")
# What a new version brings or removes. Everything else in the repository is the owner's, and stays.
COPIED_FILES = (WEIGHTS, "generation_config.json", *TOKENIZER_FILES, *RESULT_FILES)
AUTO_CLASSES = {
    "AutoModelForCausalLM": "KRUForCausalLM",
    "AutoModelForSequenceClassification": "KRUForSequenceClassification",
    "AutoModelForTokenClassification": "KRUForTokenClassification",
}
# huggingface_hub's error derives from that of its HTTP client: httpx in 1.x, a successor from 2.x on.
ClientError: type[Exception] = HfHubHTTPError.__bases__[0]


@dataclass
class PublishOptions:
    """What is published, and where."""

    model: str = dataclasses.field(metadata={"help": "Folder of a finished run."})
    repo_id: str = dataclasses.field(metadata={"help": "Repository on the Hub: ME/NAME or ORGANISATION/NAME."})
    private: bool = dataclasses.field(default=False, metadata={"help": "Create the repository as a private one."})
    revision_tag: str | None = dataclasses.field(default=None, metadata={"help": "Tag of this version, such as v1."})
    create_pr: bool = dataclasses.field(
        default=False, metadata={"help": "Propose the change as a pull request, also in repositories of others."}
    )
    dry_run: bool = dataclasses.field(
        default=False, metadata={"help": "Check and list what would be published; no network is used."}
    )
    data_license: str | None = dataclasses.field(
        default=None, metadata={"help": "Licence of the training data; needed unless the data is a built-in set."}
    )
    license: str = dataclasses.field(
        default="apache-2.0", metadata={"help": "Licence of the weights, by its name on the Hub."}
    )


@dataclass(frozen=True)
class Published:
    """What has been published: the address, the commit to pin, and what else there is to know.

    ``unchanged`` is True if the repository already held all of it. ``files`` are names and sizes in bytes.
    """

    repo_id: str
    files: dict[str, int]
    url: str | None = None
    commit: str | None = None
    tag: str | None = None
    pull_request: str | None = None
    unchanged: bool = False


# What is published


def model_class(name: str) -> type[PreTrainedModel] | None:
    """The class of kru_hf that has that name, or None."""
    return getattr(kru_hf, name, None) or getattr(kru_hf.modeling_kru, name, None)


def code_files(entries: dict[str, str]) -> list[Path]:
    """The modelling files: those that an auto_map names, and what they import. They lie flat in the package."""
    starts = {PACKAGE / f"{reference.split('.')[0]}.py" for reference in entries.values()}
    return sorted(starts | {Path(name) for start in starts for name in get_relative_import_files(start)})


def auto_map(config: dict[str, Any]) -> dict[str, str]:
    """Auto class -> "file.Class": the trained head, the body, and every classification head (for fine-tuning)."""
    trained = config["architectures"][0]
    body = trained if trained == "KRUForPianoRoll" else "KRUModel"
    wanted = {"AutoConfig": "KRUConfig", "AutoModel": body}
    for auto, name in AUTO_CLASSES.items():
        # A causal language model's head without its weights would write nonsense; a classifier is meant to be trained.
        if name == trained or (auto != "AutoModelForCausalLM" and body == "KRUModel"):
            wanted[auto] = name
    found = {auto: model_class(name) for auto, name in wanted.items()}
    return {auto: f"{c.__module__.rpartition('.')[2]}.{c.__name__}" for auto, c in found.items() if c is not None}


def published_config(folder: Path) -> bytes:
    """config.json with its auto_map, and with the choice of the engine left to the machine that loads it."""
    config = read_json(folder / "config.json")
    config = {**config, "auto_map": auto_map(config), "scan_backend": "auto"}
    config.pop("_name_or_path", None)
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def check_folder(folder: Path, data_license: str | None = None) -> None:
    """Whether a folder can be published: weights and tokenizer load, results are there, the card is complete.

    Raises:
        UserError: with everything that is missing, in one message.
    """
    if not folder.is_dir():
        raise UserError(f"model={str(folder)!r} is not a folder: publish the --output_dir of a finished run")
    missing = [name for name in ("config.json", WEIGHTS, "all_results.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"model={str(folder)!r} has no {', '.join(missing)}: it is not the folder of a finished run")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "kru":
        raise UserError(
            f"model={str(folder)!r} is of the type {config.get('model_type')!r}: only 'kru' models have code to publish"
        )
    missing = missing_fields(folder, data_license)
    if missing:
        raise UserError(f"the card of model={str(folder)!r} would lack: {'; '.join(missing)}")
    check_weights(folder, config["architectures"][0])


def check_weights(folder: Path, class_name: str) -> None:
    """Load weights and tokenizer, exactly, as a user would."""
    head = model_class(class_name)
    if head is None:
        raise UserError(f"config.json names the class {class_name!r}, which kru_hf {kru_hf.__version__} does not have")
    try:
        config: PreTrainedConfig = kru_hf.KRUConfig.from_pretrained(folder)
        loaded: Any = head.from_pretrained(folder, config=config, output_loading_info=True)
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"the weights in {str(folder)!r} do not load: {error}") from error
    model, report = loaded
    wrong = {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        shown = "; ".join(f"{key.replace('_', ' ')}: {', '.join(names[:5])}" for key, names in wrong.items() if names)
        raise UserError(f"the weights in {str(folder)!r} do not fit config.json: {shown}")
    broken = [name for name, value in model.named_parameters() if not bool(value.isfinite().all())]
    if broken:
        raise UserError(f"the weights in {str(folder)!r} are not finite: {', '.join(broken[:5])}")
    if class_name != "KRUForCausalLM":
        return
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"model={str(folder)!r} is a language model without tokenizer.json")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if len(tokenizer) != config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but config.json's vocab_size is {config.vocab_size}"
        )


def collect(folder: Path, options: PublishOptions) -> dict[str, bytes | Path]:
    """Every file of the commit by its name in the repository."""
    files: dict[str, bytes | Path] = {name: folder / name for name in COPIED_FILES if (folder / name).is_file()}
    files["config.json"] = published_config(folder)
    files.update({path.name: path for path in code_files(json.loads(content(files["config.json"]))["auto_map"])})
    card = render_card(
        folder,
        repo_id=options.repo_id,
        revision=options.revision_tag,
        data_license=options.data_license,
        license=options.license,
    )
    files["README.md"] = card.encode()
    license_file = PACKAGE.parent / "LICENSE"
    if license_file.is_file():
        files["LICENSE"] = license_file
    return dict(sorted(files.items()))


def content(source: bytes | Path) -> bytes:
    """The bytes of a file to publish."""
    return source if isinstance(source, bytes) else source.read_bytes()


# The Hub


@contextmanager
def explained(repo_id: str, doing: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a `UserError` that says what to do."""
    again = "nothing was half-published; run the same command again to finish"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError(f"cannot publish: HF_HUB_OFFLINE is set; unset it, and {again}") from error
    except HFValidationError as error:
        raise UserError(f"repo_id={repo_id!r} is not valid: it must be ME/NAME ({error})") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the repository {repo_id!r} does not exist, or the token may not see it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {
            401: "the Hub does not accept the token; make one at the Hub's settings/tokens, then: hf auth login",
            403: f"the token has no permission to write to {repo_id!r}; use a token with the role 'write', a "
            "repository of your own, or --create_pr",
            409: f"{repo_id!r} was changed by someone else at the same time; run the same command again",
            412: f"{repo_id!r} was changed by someone else at the same time; run the same command again",
        }
        reason = reasons.get(status, f"the Hub answered {status}: {error.server_message or error}; {again}")
        raise UserError(f"cannot publish ({doing}): {reason}") from error
    except (ClientError, ConnectionError, TimeoutError) as error:
        raise UserError(f"cannot publish ({doing}): the Hub cannot be reached ({error}); {again}") from error
    except RuntimeError as error:  # what the client makes of a failed upload of a single large file
        cause = error.__cause__ or error
        raise UserError(f"cannot publish ({doing}): the upload was interrupted ({cause}); {again}") from error


def may_write(api: HfApi, repo_id: str) -> tuple[bool, str]:
    """Whether the token's owner has the namespace of ``repo_id``, and the owner's name."""
    me = api.whoami()
    return repo_id.split("/")[0] in {me["name"], *(group["name"] for group in me.get("orgs", []))}, me["name"]


def check_token(api: HfApi) -> None:
    """An error that says how to log in if there is no token."""
    import huggingface_hub

    if not (api.token or huggingface_hub.get_token()):
        raise UserError("there is no Hub token: run `hf auth login`, or set HF_TOKEN to a token with the role 'write'")


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


def check_other_model(api: HfApi, repo_id: str, there: dict[str, RepoFile]) -> None:
    """An error if the repository holds a model of another kind, which the commit would mix with this one."""
    if "config.json" not in there:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo_id, "config.json", local_dir=folder)
        model_type = read_json(Path(path)).get("model_type")
    if model_type != "kru":
        raise UserError(
            f"the name {repo_id!r} is taken: it holds a model of the type {model_type!r}; choose another name"
        )


def prepare_repo(api: HfApi, options: PublishOptions) -> None:
    """Make sure that the repository exists and that the caller may do what was asked."""
    repo_id = options.repo_id
    mine, me = may_write(api, repo_id)
    exists = api.repo_exists(repo_id)
    if options.create_pr:
        if not exists:
            raise UserError(f"--create_pr needs an existing repository, and {repo_id!r} does not exist")
        return
    if not mine:
        state = "is taken: it belongs to" if exists else "is in the namespace of"
        hint = f"choose {me}/{repo_id.split('/')[1]}" + (", or propose a change with --create_pr" if exists else "")
        raise UserError(f"the name {repo_id!r} {state} {repo_id.split('/')[0]!r}, and you are {me!r}: {hint}")
    if not exists:
        api.create_repo(repo_id, private=options.private, exist_ok=True)


def push(api: HfApi, files: dict[str, bytes | Path], options: PublishOptions) -> Published:
    """One commit with all files, then the tag; what is already there is left alone."""
    repo_id, tag = options.repo_id, options.revision_tag
    sizes = {name: len(content(source)) for name, source in files.items()}
    with explained(repo_id, "preparing the repository"):
        prepare_repo(api, options)
        head = api.repo_info(repo_id).sha
        there = remote_files(api, repo_id, "main")
        check_other_model(api, repo_id, there)
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
        changed = [name for name, source in files.items() if not same(content(source), there.get(name))]
        old = [name for name in COPIED_FILES if name in there and name not in files]
        if tag in tags and (changed or old or tags[tag] != head):
            tagged = remote_files(api, repo_id, tag)
            if all(same(content(source), tagged.get(name)) for name, source in files.items()):
                return Published(repo_id, sizes, f"{api.endpoint}/{repo_id}", tags[tag], tag, unchanged=True)
            raise UserError(
                f"revision_tag={tag!r} already exists in {repo_id!r} at {tags[tag]} with other content; choose another"
            )
    commit, pull_request = head, None
    if changed or old:
        with explained(repo_id, "uploading"):
            info = api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=files[name]) for name in changed),
                    *(CommitOperationDelete(path_in_repo=name) for name in old),
                ],
                commit_message=f"Publish {tag}" if tag else "Publish the trained model",
                create_pr=options.create_pr,
                parent_commit=head,
            )
        commit, pull_request = info.oid, info.pr_url
    if tag is not None and tag not in tags:
        with explained(repo_id, f"tagging {tag}; the files are there already"):
            api.create_tag(repo_id, tag=tag, revision=commit)
    unchanged = not changed and not old
    return Published(repo_id, sizes, f"{api.endpoint}/{repo_id}", commit, tag, pull_request, unchanged)


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision_tag: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    data_license: str | None = None,
    license: str = "apache-2.0",
    api: HfApi | None = None,
) -> Published:
    """Check a trained folder and publish it; the options are those of :class:`PublishOptions`.

    Args:
        api: the client to use; by default one that takes endpoint and token from the environment.

    Raises:
        UserError: the folder cannot be published, or the Hub refuses. Running again is always safe.
    """
    options = PublishOptions(str(folder), repo_id, private, revision_tag, create_pr, dry_run, data_license, license)
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise UserError(f"repo_id={repo_id!r} is not valid: it must be ME/NAME")
    if create_pr and revision_tag is not None:
        raise UserError("--revision_tag cannot be given with --create_pr: the owner tags after the merge")
    check_folder(Path(folder), data_license)
    files = collect(Path(folder), options)
    if dry_run:
        return Published(repo_id, {name: len(content(source)) for name, source in files.items()})
    api = api or HfApi()
    check_token(api)
    return push(api, files, options)


def report(published: Published) -> str:
    """What the command line says at the end."""
    lines = [f"{size:>12,}  {name}" for name, size in published.files.items()]
    if published.url is None:
        return "\n".join([f"would publish to {published.repo_id}:", *lines, "dry run: nothing was sent"])
    if published.unchanged:
        lines = ["everything was there already"]
    lines.append(f"address: {published.url}")
    if published.pull_request:
        lines.append(f"pull request: {published.pull_request}")
    if published.tag:
        lines.append(f"tag: {published.tag}")
    return "\n".join([*lines, f'pin it with revision="{published.commit}"'])


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options_class: Any = PublishOptions  # the stub wants a protocol that dataclasses do not match
    parser = HfArgumentParser(options_class, prog="training.publish", description="Publish a trained folder.")
    (options,) = parser.parse_args_into_dataclasses(argv)
    values = dataclasses.asdict(options)
    try:
        print(report(publish_folder(values.pop("model"), values.pop("repo_id"), **values)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
