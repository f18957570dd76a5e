"""Downloads a checkpoint from the Hugging Face hub. Imported, like ``huggingface_hub`` itself, for hub ids alone."""

from __future__ import annotations

from pathlib import Path

from httpx import HTTPError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from jitgraph.errors import CheckpointError

SMALL_FILES = ("*.json", "*.jinja", "*.model")
WEIGHT_FILES = ("*.safetensors",)
IGNORED = ("original/*", "consolidated*", "*/*")
"""Second copies of the weights in the makers' own layouts, and everything in sub-folders."""


def download(repo: str, weights: bool) -> Path:
    """The local snapshot of a repository, downloaded where it is not cached; progress is huggingface_hub's own.

    Args:
        repo: ``owner/name``.
        weights: False fetches the configuration and tokenizer alone.

    Raises:
        CheckpointError: not found, gated, no network and not cached, or a failed download.
    """
    patterns = [*SMALL_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=list(IGNORED)))
    except GatedRepoError:  # before its base, RepositoryNotFoundError
        advice = f"accept its terms at https://huggingface.co/{repo} and set HF_TOKEN"
        raise CheckpointError(f"the hub repository {repo} is gated: {advice}") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo!r} is neither a local folder nor a hub repository you can see: check the name, or set HF_TOKEN"
        ) from None
    except HFValidationError as error:
        raise CheckpointError(f"{repo!r} is not a local folder and not a valid hub id: {error}") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        raise CheckpointError(
            f"{repo!r} is not a local folder, is not in the hub's cache and the hub cannot be reached: "
            "check the path, or the network and HF_HUB_OFFLINE"
        ) from None
    except (HTTPError, OSError) as error:
        raise CheckpointError(f"downloading {repo} failed ({error}): try again") from None
