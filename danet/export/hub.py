"""Exported folders on a Hugging Face hub; needs the optional package huggingface_hub."""

from pathlib import Path

from danet.errors import InputError, UserError
from danet.export.folder import CONFIG, WEIGHTS
from danet.export.programs import require

SCHEME = "hf://"
"""Begins the name of a repository where a path is expected: ``hf://owner/name[@revision]``."""


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Uploads an exported folder, makes the repository where there is none; returns its address.

    The token is that of ``hf auth login`` or of the variable HF_TOKEN.

    Raises:
        InputError: The package is missing, or the hub refuses.
    """
    require("huggingface_hub")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload an exported network",
            ignore_patterns=[".*"],
        )
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"push={repository}: {_first_line(error)}") from error
    except OSError as error:  # no network
        raise UserError(f"push={repository}: {_first_line(error)}") from error
    return str(commit)


def fetch(name: str) -> Path:
    """Returns the local copy of a repository, downloaded once.

    Args:
        name: ``hf://owner/name`` or ``hf://owner/name@revision``.

    Raises:
        InputError: The package is missing, or there is no such repository or revision.
    """
    require("huggingface_hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.removeprefix(SCHEME).partition("@")
    try:
        found = snapshot_download(
            repository, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS]
        )
    except LocalEntryNotFoundError as error:
        raise UserError(f"{name}: neither reachable nor here already") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"{name}: {_first_line(error)}") from error
    return Path(found)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
