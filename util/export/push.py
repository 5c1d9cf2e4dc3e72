"""`export.py --push OWNER/NAME`: uploads a finished export, with its card, to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from util.console import say
from util.errors import UserError
from util.export.files import WRITTEN
from util.files import printable, some


def check_push(name: str) -> None:
    """Raises UserError for a name that no repository of the hub can have."""
    if name.count("/") != 1:
        raise UserError(f"--push {name}: must be OWNER/NAME")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: {error}") from None


def push(folder: Path, name: str, private: bool, yes: bool, overwrite: bool) -> None:
    """Says what would go from the export `folder` to the repository `name`; with `yes` uploads it.

    Args:
        private: of a repository that is made. overwrite: it may exist, and gets a new commit.

    Raises:
        UserError: no finished export, no login, a name that is taken, or the hub refuses or does not answer.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    names = [path.name for path in files]
    if "README.md" not in names or len(names) < 2:
        raise UserError(f"--push {name}: {folder} is no finished export; make one with --to")
    if strange := [entry.name for entry in folder.iterdir() if entry.name not in WRITTEN]:
        raise UserError(f"--push {name}: {folder} also holds {some(strange, 3)}, which no export wrote")
    where = f"https://huggingface.co/{name} ({'private' if private else 'public'})"
    say(f"{'uploading' if yes else 'would upload'} {printable(folder)} to {where}:")
    for path in files:
        say(f"  {path.name}: {path.stat().st_size:,} bytes")
    if not yes:
        say("nothing was sent; look at README.md there (licence, data), then pass --yes as well")
        return
    api = HfApi()
    try:
        api.whoami()
        api.create_repo(name, private=private, exist_ok=overwrite)
        url = api.upload_folder(
            folder_path=folder, repo_id=name, commit_message="Export of a masked autoencoder"
        )
    except LocalTokenNotFoundError:
        raise UserError(f"--push {name}: no login; run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) == 409:
            raise UserError(f"--push {name}: exists already; --overwrite adds a commit to it") from None
        raise UserError(f"--push {name}: the hub refuses: {str(error).splitlines()[0]}") from None
    except Exception as error:  # no network: the error is of whatever library is below
        raise UserError(f"--push {name}: the hub does not answer: {error}") from None
    say(f"uploaded: {url}")
