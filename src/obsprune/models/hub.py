"""Downloads from the Hugging Face hub: of the forms in which a repository holds its weights, the first that is read."""

from __future__ import annotations

from pathlib import Path

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

from obsprune.errors import InputError
from obsprune.models.checkpoint import SIDE_FILES
from obsprune.models.files import FILE_KINDS, Layout
from obsprune.models.meta import META
from obsprune.models.origin import CARD
from obsprune.models.packed_layout import PACKED

LAYOUTS: tuple[Layout, ...] = (*FILE_KINDS, META)
TWICE = ["original/*", "consolidated*.safetensors*"]
"""Where repositories hold the same weights a second time, Meta's or Mistral's way."""


def download(name: str, revision: str | None, token: str | None) -> Path:
    """The directory in the cache: side files, and weights in one form. Raises InputError with the way out."""
    for layout in LAYOUTS:
        wanted = [*SIDE_FILES, CARD, *layout.patterns]
        directory = _snapshot(name, revision, token, wanted)
        if layout.found(directory) or PACKED.found(directory):  # its files are safetensors, too
            break
    return directory


def _snapshot(name: str, revision: str | None, token: str | None, wanted: list[str]) -> Path:
    try:
        return Path(
            snapshot_download(name, revision=revision, token=token, allow_patterns=wanted, ignore_patterns=TWICE)
        )
    except GatedRepoError as error:
        raise InputError(f"{name} is gated: accept its licence on the hub and give --token or set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision '{revision}'") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no directory and no Hugging Face model '{name}' (a private one needs --token)"
        ) from error
    except HFValidationError as error:
        raise InputError(f"'{name}' is neither a directory nor a Hugging Face id") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"'{name}' is no local directory, is not in the Hugging Face cache, and the hub cannot be reached "
            "(no network, or HF_HUB_OFFLINE is set)"
        ) from error
