"""An exported folder on the Hugging Face Hub, or on the server that HF_ENDPOINT names."""

import json
import sys
from pathlib import Path

from fedlora.errors import BadInput, RunFailed, first_line
from fedlora.names import is_local

# What is in a repository from an export before this one, and would be taken for a part of it: an adapter beside a whole model is
# loaded on top of that.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json"]
TOKEN = "set HF_TOKEN, or log in by `hf auth login`"


def check(repository: str) -> None:
    """BadInput for what no push can come of: no ORG/NAME, no token, or offline. Asked before an export begins."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise BadInput(f"--push {repository}: {first_line(error)}") from error
    if "/" not in repository:
        raise BadInput(f"--push {repository}: ORG/NAME is needed, as in my-hospital/{repository}")
    if constants.HF_HUB_OFFLINE:
        raise BadInput(f"--push {repository}: HF_HUB_OFFLINE=1 keeps the network off; unset it, or leave --push out")
    if get_token() is None:
        raise BadInput(f"--push {repository}: no token for the Hub; {TOKEN}")


def private_base(folder: Path) -> str | None:
    """The base that an exported adapter names, where that is a folder or a file, which others do not have; else None."""
    file = folder / "adapter_config.json"
    base = str(json.loads(file.read_text())["base_model_name_or_path"]) if file.exists() else ""
    return base if base and is_local(base) else None


def push(folder: Path, repository: str, public: bool) -> str:
    """Upload an exported folder, whole; returns where it is to be seen. A repository that is not there is made, private unless
    `public`; in one that is, the files of the folder and the weights of an export before it are replaced, and its visibility stays.

    Raises:
        BadInput: the Hub refuses it.
        RunFailed: the Hub cannot be reached, or fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    kept = f"the exported folder is kept; push it by: hf upload {repository} {folder}"
    try:
        if not api.repo_exists(repository):
            api.create_repo(repository, private=not public)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload a result of fedlora",
            delete_patterns=REPLACED,
        )
    except Exception as error:  # of its own, of httpx and of threads around these: there is no common class
        found = next((each for each in _causes(error) if isinstance(each, HfHubHTTPError)), None)
        status = 0 if found is None else found.response.status_code
        if status in (401, 403):
            raise BadInput(f"--push {repository}: this token may not write there ({_said(error)}); {kept}") from error
        if 400 <= status < 500:
            raise BadInput(f"--push {repository}: refused ({_said(error)}); {kept}") from error
        raise RunFailed(f"--push {repository}: {api.endpoint}: {_said(error)}; {kept}") from error
    return f"{api.endpoint}/{repository}"


def _causes(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *_causes(error.__cause__)]


def _said(error: BaseException) -> str:
    """What the innermost error says, in a line."""
    return first_line(_causes(error)[-1]).rstrip(".:;")
