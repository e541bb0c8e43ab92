"""Publishing a trained folder on the Hub.

The folder is checked and everything is put together first. Then one commit brings weights, config, modelling code,
tokenizer, card and results at once, so nothing is ever half-published: after a failure, the same command again
finishes. What is already there in the same form is not uploaded twice.
"""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from transformers.dynamic_module_utils import get_relative_import_files

import kru_hf

from ..common.errors import UserError
from ..common.files import read_json
from ..common.run_folder import COMPANIONS, MODEL_FILES, WEIGHTS
from ..models.build import load_model
from ..models.heads import BY_CLASS, HEADS
from ..options.fields import REQUIRED, option
from .cards import DATA_SOURCES, missing_fields, render_card
from .hub import (
    PROPOSAL,
    check_access,
    check_license,
    check_name,
    check_tag,
    explained,
    open_proposal,
    remote_files,
    same,
)
from .run_record import HISTORY, RECIPE, RESULTS, RUN, published_recipe, read_history

PACKAGE = Path(kru_hf.__file__).parent
# What a new version brings or removes. Everything else in the repository is the owner's, and stays.
COPIED_FILES = (
    *(WEIGHTS, *MODEL_FILES[1:]),
    *(RECIPE, RUN, RESULTS, HISTORY, "learning_curve.png", *COMPANIONS),
)


@dataclass
class PublishOptions:
    """What is published, and where."""

    model: str = option(REQUIRED, "Folder of a finished run.")
    repo_id: str = option(REQUIRED, "Repository on the Hub: ME/NAME or ORGANISATION/NAME.")
    private: bool = option(False, "Create the repository as a private one.")
    revision_tag: str | None = option(None, "Tag of this version, such as v1.")
    create_pr: bool = option(False, "Propose the change as a pull request, also in repositories of others.")
    dry_run: bool = option(False, "Check and list what would be published; no network is used.")
    data_license: str | None = option(None, "Licence of the training data; needed unless the data is a built-in set.")
    license: str = option("apache-2.0", "Licence of the weights, by its name on the Hub.")


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


def code_files(entries: dict[str, str]) -> list[Path]:
    """The modelling files: those that an auto_map names, and what they import. They lie flat in the package."""
    starts = {PACKAGE / f"{reference.split('.')[0]}.py" for reference in entries.values()}
    return sorted(starts | {Path(name) for start in starts for name in get_relative_import_files(start)})


def auto_map(config: dict[str, Any]) -> dict[str, str]:
    """Auto class -> "file.Class": the trained head, the body, and every classification head (for fine-tuning)."""
    trained = config["architectures"][0]
    own_body = trained == "KRUForPianoRoll"
    wanted = {"AutoConfig": "KRUConfig", "AutoModel": trained if own_body else "KRUModel"}
    for name, head in BY_CLASS.items():
        # A causal language model's head without its weights would write nonsense; a classifier is meant to be trained.
        if name == trained or ("Classification" in name and not own_body):
            wanted[HEADS[head].auto.__name__] = name
    found = {auto: getattr(kru_hf, name) for auto, name in wanted.items()}
    return {auto: f"{c.__module__.rpartition('.')[2]}.{c.__name__}" for auto, c in found.items()}


def published_config(folder: Path) -> bytes:
    """config.json with its auto_map."""
    config = read_json(folder / "config.json")
    config = {**config, "auto_map": auto_map(config)}
    config.pop("_name_or_path", None)
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def check_folder(folder: Path, data_license: str | None = None) -> None:
    """Whether a folder can be published: weights and tokenizer load, results are there, the card is complete.

    Raises:
        UserError: with everything that is missing, in one message; or the file or field that is wrong.
    """
    if not folder.is_dir():
        raise UserError(f"model={str(folder)!r} is not a folder: publish the --output_dir of a finished run")
    missing = [name for name in ("config.json", WEIGHTS, RESULTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"model={str(folder)!r} has no {', '.join(missing)}: it is not the folder of a finished run")
    for path in (folder / name for name in ("config.json", *COPIED_FILES)):
        # A folder from somebody else must not pick files of mine.
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(f"{str(path)!r} is a symbolic link or a folder: put the file itself there, or remove it")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "kru":
        raise UserError(
            f"model={str(folder)!r} is of the type {config.get('model_type')!r} (config.json): only 'kru' models "
            "have code to publish"
        )
    for name, field in (("config.json", "custom_pipelines"), ("tokenizer_config.json", "auto_map")):
        if field in read_json(folder / name, optional=True):
            raise UserError(f"{name}: {field} would run code from elsewhere for whoever loads the model; remove it")
    missing = missing_fields(folder, data_license)
    if missing:
        raise UserError(f"the card of model={str(folder)!r} would lack: {'; '.join(missing)}")
    read_history(folder / HISTORY)
    for name, value in read_json(folder / RESULTS).items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"{RESULTS}: {name}={value} is not valid: it must be finite")
    check_model(folder, config["architectures"][0])


def check_model(folder: Path, class_name: str) -> None:
    """Load weights and tokenizer, exactly, as a user would."""
    if class_name not in BY_CLASS:
        known = ", ".join(BY_CLASS)
        raise UserError(f"config.json names the class {class_name!r}; kru_hf {kru_hf.__version__} publishes {known}")
    model, tokenizer = load_model(str(folder), BY_CLASS[class_name])
    if type(model).__name__ != class_name:
        raise UserError(f"config.json names the class {class_name!r}, but describes a {type(model).__name__}")
    if class_name == "KRUForCausalLM" and tokenizer is None:
        raise UserError(f"model={str(folder)!r} is a language model without tokenizer.json")


def collect(folder: Path, options: PublishOptions) -> dict[str, bytes]:
    """Every file of the commit by its name in the repository."""
    config = published_config(folder)
    paths = [folder / name for name in COPIED_FILES] + [PACKAGE.parent / "LICENSE"]
    paths += code_files(json.loads(config)["auto_map"])
    files = {path.name: path.read_bytes() for path in paths if path.is_file()}
    if RECIPE in files:
        files[RECIPE] = published_recipe(folder)
    card = render_card(
        folder,
        repo_id=options.repo_id,
        revision=options.revision_tag,
        data_license=options.data_license,
        license=options.license,
    )
    return dict(sorted({**files, "config.json": config, "README.md": card.encode()}.items()))


# The push


def push(api: HfApi, files: dict[str, bytes], options: PublishOptions) -> Published:
    """One commit with all files, then the tag; what is already there is left alone."""
    repo_id, tag = options.repo_id, options.revision_tag
    sizes = {name: len(content) for name, content in files.items()}
    me, exists = check_access(api, repo_id, options.private, options.create_pr)
    with explained(repo_id, "preparing the repository"):
        if not exists:
            api.create_repo(repo_id, private=options.private, exist_ok=True)
        proposal = open_proposal(api, repo_id, me) if options.create_pr else None
        branch = (proposal.git_reference if proposal else None) or "main"
        head = api.repo_info(repo_id, revision=branch).sha
        there = remote_files(api, repo_id, branch)
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
        changed = [name for name, content in files.items() if not same(content, there.get(name))]
        old = [name for name in COPIED_FILES if name in there and name not in files]
        if tag in tags and (changed or old or tags[tag] != head):
            tagged = remote_files(api, repo_id, tag)
            if all(same(content, tagged.get(name)) for name, content in files.items()):
                return Published(repo_id, sizes, f"{api.endpoint}/{repo_id}", tags[tag], tag, unchanged=True)
            raise UserError(
                f"revision_tag={tag!r} already exists in {repo_id!r} at {tags[tag]} with other content; choose another"
            )
    commit, pull_request = head, proposal.url if proposal else None
    if changed or old:
        with explained(repo_id, "uploading"):
            info = api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=files[name]) for name in changed),
                    *(CommitOperationDelete(path_in_repo=name) for name in old),
                ],
                commit_message=f"Publish {tag}" if tag else PROPOSAL,
                create_pr=options.create_pr and proposal is None,
                revision=branch,
                parent_commit=head,
            )
        commit, pull_request = info.oid, info.pr_url or pull_request
    if tag is not None and tag not in tags:
        with explained(repo_id, f"tagging {tag}; the files are there already"):
            api.create_tag(repo_id, tag=tag, revision=commit)
    return Published(repo_id, sizes, f"{api.endpoint}/{repo_id}", commit, tag, pull_request, not changed and not old)


def check_before_training(repo_id: str, private: bool, model_type: str, data: str, data_license: str | None) -> None:
    """Whether a run that is about to start can be published at its end; nothing is changed on the Hub.

    Args:
        model_type: of the model's config. data: name of the data set. data_license: as given.

    Raises:
        UserError: what would make the publication fail.
    """
    if model_type != "kru":
        raise UserError(
            f"push_to_hub: models of the type {model_type!r} have no code to publish; train with --architecture kru, "
            "or without --push_to_hub"
        )
    if data not in DATA_SOURCES and not data_license:
        raise UserError(f"push_to_hub: the card needs the licence of {data!r}; pass --data_license")
    check_access(HfApi(), repo_id, private)


def publish_command(folder: Path, repo_id: str, private: bool, data_license: str | None) -> str:
    """The command that publishes a finished run."""
    words = ["--model", str(folder), "--repo_id", repo_id, *(["--private"] if private else [])]
    return shlex.join(
        ["python", "-m", "training.publish", *words, *(["--data_license", data_license] if data_license else [])]
    )


def publish_folder(folder: str | Path, repo_id: str, *, api: HfApi | None = None, **others: Any) -> Published:
    """Check a trained folder and publish it.

    Args:
        api: the client to use; by default one that takes endpoint and token from the environment.
        others: of :class:`PublishOptions`.

    Raises:
        UserError: the folder cannot be published, which a dry run finds too, or the Hub refuses. Running again is safe.
    """
    options = PublishOptions(str(folder), repo_id, **others)
    check_name(repo_id)
    check_tag(options.revision_tag)
    check_license(options.license)
    if options.create_pr and options.revision_tag is not None:
        raise UserError("--revision_tag cannot be given with --create_pr: the owner tags after the merge")
    check_folder(Path(folder), options.data_license)
    files = collect(Path(folder), options)
    if options.dry_run:
        return Published(repo_id, {name: len(content) for name, content in files.items()})
    return push(api or HfApi(), files, options)


def said(published: Published) -> str:
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
