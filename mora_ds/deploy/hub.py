"""Uploads models and adapters to the Hugging Face Hub, by huggingface_hub.

The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN): no flag takes one, so
that none is in run.yaml, in a log or in a message. A repository that does not exist is
made, private.
"""

import tempfile
from pathlib import Path

from mora_ds.common.errors import RunError, UserError, reason
from mora_ds.deploy.adapter_io import export_adapter
from mora_ds.deploy.model_card import write_card

FLAG = "--push_to_hub"


def check_repository(repository: str) -> None:
    """Raises `UserError` for a name that the Hub cannot have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{FLAG} {repository}: {reason(error)}") from None


def push_folder(folder: Path, repository: str) -> str:
    """Uploads all files of `folder` as one commit and returns a line to print.

    Raises `RunError` where there is no network, no token or no permission.
    """
    from huggingface_hub import HfApi, get_token

    # The error of the client that it uses: of httpx, or of httpx2 from 2.4 on.
    from huggingface_hub.errors import HTTPError

    try:
        api = HfApi()
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"Upload {folder.name} by mora_ds",
        )
    # OSErrors are also huggingface_hub's own errors, and its offline mode.
    except (HTTPError, OSError) as error:
        why = reason(error)
        if token := get_token():
            why = why.replace(token, "***")
        raise RunError(
            f"{FLAG} {repository}: not uploaded ({why}); hf upload {repository} FOLDER tries again"
        ) from None
    return f"uploaded {folder} to {url}"


def push_adapter(checkpoint: Path, repository: str) -> str:
    """Upload the adapter of a checkpoint alone, with a model card. Returns and raises
    as `push_folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        facts = export_adapter(checkpoint, folder)[0].partition(": ")[2]
        text = f"MoRA matrices and merge ledger of a continual pretraining: {facts}. `base.json` names the base."
        name = repository.rpartition("/")[2]
        code = ["```python", f'model = mora_ds.load_adapter("BASE", "{name}")', "```"]
        write_card(folder, "mora_ds", "mora", name, [text, "", *code])
        return push_folder(folder, repository)
