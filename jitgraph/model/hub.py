"""Downloads a checkpoint from the Hugging Face hub. Imported, like ``huggingface_hub`` itself, for hub ids alone.

The client takes a broken connection up where it ended, checks sizes, and puts a file into a snapshot only once it is
whole; after a call that failed, whole files are kept and the broken one begins anew. Where it keeps them (HF_HOME), its
token (HF_TOKEN) and whether it may use the network (HF_HUB_OFFLINE) are its own variables.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from httpx import HTTPError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from jitgraph.errors import CheckpointError

SMALL_FILES = ("*.json", "*.jinja", "*.model")
WEIGHT_FILES = ("*.safetensors",)
IGNORED = ("original/*", "consolidated*", "*/*")
"""Second copies of the weights in the makers' own layouts, and everything in sub-folders."""
Progress = Callable[[str, int, int], None]


def download(repo: str, revision: str | None, weights: bool, progress: Progress | None = None) -> Path:
    """The local snapshot of a repository, downloaded where it is not cached. Its folder's name is the commit.

    Args:
        repo: ``owner/name``.
        revision: branch, tag or commit; None is the main branch.
        weights: False fetches the configuration and tokenizer alone.
        progress: told (phase, MiB done, MiB in all) instead of the client's own bars on standard error.

    Raises:
        CheckpointError: not found, gated, no such revision, no network and not whole in the cache, a failed download.
    """
    named = repo if revision is None else f"{repo}@{revision}"
    how: dict[str, Any] = {} if progress is None else {"tqdm_class": _bar(progress)}
    patterns = [*SMALL_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        found = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=list(IGNORED), **how
        )
        return Path(found)
    except GatedRepoError:  # before its base, RepositoryNotFoundError
        advice = f"accept its terms at https://huggingface.co/{repo} and set HF_TOKEN"
        raise CheckpointError(f"the hub repository {repo} is gated: {advice}") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo!r} is neither a local folder nor a hub repository you can see: check the name, or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"the hub repository {repo} has no revision {revision!r}: check its name") from None
    except HFValidationError as error:
        raise CheckpointError(f"{repo!r} is not a local folder and not a valid hub id: {_line(error)}") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        raise CheckpointError(
            f"{named!r} is not a local folder, is not (or not as a whole) in the hub's cache, and the hub cannot be "
            "reached: check the path, or the network and HF_HUB_OFFLINE"
        ) from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"downloading {named} failed (HTTP {error.response.status_code}): try again") from None
    except (HTTPError, OSError) as error:
        raise CheckpointError(
            f"downloading {named} failed ({_line(error)}): try again, files that are whole are kept"
        ) from None


def _line(error: Exception) -> str:
    """An error's words in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _bar(progress: Progress) -> type[tqdm]:
    """The client's bar, but that it draws nothing and tells ``progress`` of bytes."""
    lock = threading.Lock()  # files come in several threads

    class Bar(tqdm):
        """Counts the bytes that stand on the disk; the client's other bars count files, and bytes on the wire."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            counts = options.get("unit") == "B" and not str(options.get("name")).endswith(".transfer")
            self._done: int | None = int(options.get("initial") or 0) if counts else None
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            """``n`` bytes more."""
            if self._done is not None:
                with lock:
                    self._done += int(n or 0)
                    progress("downloading (MiB)", self._done >> 20, max(self._done, int(self.total or 0)) >> 20)
            return None

    return Bar
