"""Exported folders on a Hugging Face hub; needs the optional package huggingface_hub."""

from pathlib import Path

from danet.errors import InputError, UserError, first_line
from danet.extras import require


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload an exported folder, create the repository if needed, and return its address.

    The token is that of ``hf auth login`` or of the variable HF_TOKEN.

    Raises:
        InputError: The package is missing, or the hub rejects the upload.
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
        raise InputError(f"push={repository}: {first_line(error)}") from error
    except OSError as error:  # no network
        raise UserError(f"push={repository}: {first_line(error)}") from error
    return str(commit)
