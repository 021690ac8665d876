"""From what a job calls its model to a folder on disk."""

from pathlib import Path

from huggingface_hub import snapshot_download

from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.hub import HUB_NAME

# Everything that is data; code that a repository may hold is left where it is.
DATA_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def locate(model_name_or_path: str | None) -> Path:
    """Return the folder of a model: a local one, or a hub's snapshot of its data files.

    Raises:
        CheckpointError: if nothing was given, or there is no such folder and no such model on the hub.
    """
    if not model_name_or_path or "{" in model_name_or_path:
        raise CheckpointError(
            f"model_name_or_path: expected a folder or a hub name, found {model_name_or_path!r}. "
            "Set it in the job; where the job takes it from an environment variable, set that on the server."
        )
    folder = Path(model_name_or_path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if not HUB_NAME.fullmatch(model_name_or_path):
        raise CheckpointError(
            f"model_name_or_path: expected a folder, found nothing at {folder.absolute()}. "
            "Give an absolute path that exists on the server."
        )
    return _download(model_name_or_path)


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=DATA_FILES))
    except Exception as error:
        raise CheckpointError(
            f"model_name_or_path: '{name}' is no folder on this machine, and the hub gave no such model "
            f"({type(error).__name__}: {error}). Give an absolute path, or download the model first."
        ) from error
