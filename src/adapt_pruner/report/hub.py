"""A checkpoint on the Hugging Face hub: find out what would be sent, and send it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt_pruner.checkpoint.untrusted import shards_in
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.files import check_regular, files_in, is_card
from adapt_pruner.core.system.provenance import installed
from adapt_pruner.errors import RunError, UsageError, first_line
from adapt_pruner.report.card import card_of, write_card

_WRITTEN = {
    filenames.CARD, filenames.CONFIG, "generation_config.json", filenames.MASK, filenames.WEIGHTS, filenames.WEIGHTS_INDEX,
    "modeling_pruned.py", "modeling_sliced.py", filenames.PRUNING, filenames.WEIGHT_MASK,
    "added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "spiece.model", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
}  # fmt: skip
"""Files that `checkpoint.save` and `report.card` write, without shards; the last two lines are those of tokenizers."""
_EXPORTED = {"configuration_decilm.py", "modeling_decilm.py", "model.onnx", "model.onnx.data"}
"""Further files that `export` writes."""
_WEIGHTS = (".safetensors", ".onnx", ".gguf")

_TEMPLATE = re.compile(r"additional_chat_templates/\w[\w.-]*\.jinja")  # of tokenizers with several templates
_SHARD = re.compile(r"\w[\w.-]*\.safetensors")
_NAMED = 8  # the most left-out files that the note names


@dataclass(frozen=True)
class Upload:
    """What goes to the hub.

    Attributes:
        folder: the checkpoint.
        repo: ORG/NAME, or NAME for one's own.
        files: name -> bytes.
        new_card: whether README.md is missing and will be written first.
        notes: sentences to read before sending.
    """

    folder: Path
    repo: str
    files: dict[str, int]
    new_card: bool
    notes: tuple[str, ...]


def plan_upload(folder: Path, repo: str) -> Upload:
    """What `push` would send. Nothing is written, and neither network nor token is needed.

    Raises:
        UsageError: `folder` is neither a finished checkpoint of ours nor an export of one, or `repo` is no name of a repository.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(
            f"{repo!r} is not the name of a repository on the hub; write ORG/NAME with letters, digits, -, _ and ., at most 96 "
            "of them"
        ) from error
    if (folder / filenames.STATE).is_file():
        raise UsageError(f"{folder} is a checkpoint in the middle of a run; let the run end and name its folder model")
    if folder.is_file():
        raise UsageError(
            f"{folder} is a file, and only a folder has a card; put it into the folder of its checkpoint and name that folder"
        )
    readme = folder / filenames.CARD
    check_regular(readme)
    exported = not (folder / filenames.PRUNING).exists() and is_card(readme)  # then `export` wrote it
    text = "" if exported else card_of(folder)
    files, left_out = _ours(folder)
    new_card = filenames.CARD not in files
    if new_card:
        files[filenames.CARD] = len(text.encode())
    else:
        text = readme.read_text(encoding="utf-8", errors="replace")
    if not any(name.endswith(_WEIGHTS) for name in files):
        raise UsageError(f"{folder} contains no weights (*.safetensors); get the folder again")
    notes = []
    if left_out:
        more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
        notes.append(
            f"{', '.join(left_out[:_NAMED])}{more}: not sent, since adapt-pruner did not write them there; add those that you "
            "want to share on the page of the repository"
        )
    if "\nlicense:" not in text.partition("\n---")[0]:
        notes.append("README.md names no license; look up that of the base model and add a line `license: …` at its top")
    return Upload(folder, repo, dict(sorted(files.items())), new_card, tuple(notes))


def _ours(folder: Path) -> tuple[dict[str, int], list[str]]:
    """The files of a checkpoint that are ours to send, with their sizes, and the names of other files; hidden files are ignored.

    Raises:
        UsageError: a file of ours is a link or no regular file, or a shard is missing.
    """
    shards = _shards(folder / filenames.WEIGHTS_INDEX)
    files: dict[str, int] = {}
    left_out = []
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    for name, path in sorted((paths | files_in(folder)).items()):
        if any(part.startswith((".", "__pycache__")) for part in name.split("/")):
            continue
        inside = [path, *path.parents][: len(Path(name).parts)]
        if name not in _WRITTEN | _EXPORTED | shards and not _TEMPLATE.fullmatch(name) and not name.endswith(".gguf"):
            left_out.append(name)
        elif any(part.is_symlink() for part in inside):
            raise UsageError(f"{path} is a link, and its target may not belong to the model; put the file itself there")
        else:
            check_regular(path, most=None)
            files[name] = path.stat().st_size
    if missing := sorted(shards - files.keys()):
        raise UsageError(f"{folder} has no {missing[0]}, which model.safetensors.index.json names; get the folder again")
    return files, left_out


def _shards(index: Path) -> set[str]:
    """The files that an index names; empty if there is no index."""
    check_regular(index)
    if not index.is_file():
        return set()
    try:
        named = shards_in(index)
    except ValueError as error:
        raise UsageError(f"{index} is damaged ({error}); get the folder again") from error
    if strange := sorted(name for name in named if not _SHARD.fullmatch(name)):
        raise UsageError(f"{index} names the file {strange[0]!r}, which is not a shard beside it; get the folder again")
    return named


def push(upload: Upload, *, private: bool = False, branch: str | None = None) -> str:
    """Make the repository if there is none, and send the files of the upload, and no others, in one commit.

    Args:
        upload: the result of `plan_upload`.
        private: the repository must be private; an existing public one is refused.
        branch: used instead of main; made if it does not exist.

    Returns:
        The address of the commit.

    Raises:
        UsageError: nobody is logged in, or may not write there.
        RunError: the hub cannot be reached, or the upload failed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # HTTPError is that of the HTTP library beneath

    if get_token() is None:
        raise UsageError("nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN to a token that may write")
    if upload.new_card:
        write_card(upload.folder)
    api = HfApi(library_name="adapt-pruner", library_version=installed("adapt-pruner"))
    try:
        repo = api.create_repo(upload.repo, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(repo).private:
            raise UsageError(f"{repo} is there already and public; make it private in its settings, or name another")
        if branch is not None:
            api.create_branch(repo, branch=branch, exist_ok=True)
        sent: Any = api.create_commit(
            repo_id=repo,
            operations=[CommitOperationAdd(name, upload.folder / name) for name in upload.files],
            revision=branch,
            commit_message=f"{upload.folder.resolve().name}, made with adapt-pruner",
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UsageError(
                f"the hub does not let you write to {upload.repo} (status {status}); name a repository of yours, "
                "or log in with a token that may write: `hf auth login`"
            ) from error
        then = "try again later" if status == 429 or status >= 500 else "correct what it names and push again"
        raise RunError(f"the hub refused {upload.repo} (status {status}): {first_line(error)}; {then}") from error
    except UsageError:
        raise
    except ValueError as error:  # what the library itself refuses, such as the front matter of a README.md
        raise UsageError(
            f"the hub refuses {upload.folder}: {' '.join(str(error).split())}; correct that and push again"
        ) from error
    except (HTTPError, ConnectionError) as error:
        raise RunError(
            f"the hub cannot be reached from here ({first_line(error)}); try again where there is a network, "
            "and without HF_HUB_OFFLINE"
        ) from error
    return str(sent.commit_url)
