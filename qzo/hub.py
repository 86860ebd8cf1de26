"""An exported folder to the Hugging Face Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qzo.errors import BadInput, RunFailed
from qzo.model.files import one_line

LOGIN = "Run `hf auth login`, or set HF_TOKEN to a token that may write."


def check_push(repo: str) -> None:
    """Raises before any work what `push` would: BadInput for a wrong name or no valid login, RunFailed where the hub is out of reach."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise BadInput(f"--push {repo}", one_line(error), "a hub id like org/name") from error
    if get_token() is None:
        raise BadInput(f"--push {repo}", "no login to the Hugging Face Hub", "a token", LOGIN)
    with _plain(repo, "Nothing was written."):
        HfApi().whoami()


def push(out: str | Path, repo: str) -> str:
    """Upload all files of the folder `out` as one commit; the repository is made if there is none. Returns its address.

    Raises BadInput where the login may not write there, RunFailed where the hub is out of reach or refuses.
    """
    from huggingface_hub import HfApi

    with _plain(repo, f"The export is in {out}; `hf upload {repo} {out} .` sends it later."):
        api = HfApi()
        made = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=str(out), commit_message=f"Upload {Path(out).name}")
    return str(made)


@contextmanager
def _plain(repo: str, do: str) -> Iterator[None]:
    """Errors of the hub and of the network as qzo's own."""
    from huggingface_hub import errors

    where = f"--push {repo}"
    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise BadInput(where, "no login to the Hugging Face Hub", "a token", f"{LOGIN} {do}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise BadInput(where, "a login that the hub does not accept (401)", "a valid token", f"{LOGIN} {do}") from error
        if status in (403, 404):
            raise BadInput(where, f"no right to write there ({status})", "a repository of your own or of your organization", f"{LOGIN} {do}") from error
        raise RunFailed(where, f"the hub answers {status} ({one_line(error)})", "", f"Try again later. {do}") from error
    except errors.OfflineModeIsEnabled as error:
        raise RunFailed(where, "HF_HUB_OFFLINE is set", "a network", f"Unset it. {do}") from error
    except (errors.HTTPError, OSError, ValueError) as error:
        raise RunFailed(where, f"the hub cannot be reached, or fails ({one_line(error)})", "a network", f"Try again later. {do}") from error
