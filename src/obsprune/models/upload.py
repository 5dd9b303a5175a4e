"""A repository on the Hugging Face hub that a result goes to: checked before the work, filled after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import final

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx, or of what came after it
    LocalTokenNotFoundError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from obsprune import __version__
from obsprune.errors import InputError, first_line
from obsprune.progress import Progress

MAIN = "main"
STALE = ("*.safetensors", "*.safetensors.index.json")
"""Weights of a former upload, which loaders would take for this one's."""
TOKEN_HELP = (
    "make one that may write at https://huggingface.co/settings/tokens, and give it by hf auth login, HF_TOKEN or "
    "--token"
)
REFUSALS = {
    401: f"the hub does not know the access token (401): {TOKEN_HELP}",
    403: f"the access token may not write to {{repo}} (403): take a name of your own or of your organisation; "
    f"{TOKEN_HELP}",
    404: "there is no repository {repo}, or the access token may not see it (404)",
}
"""By the status of an answer."""


@final
@dataclass(frozen=True)
class Repository:
    """A model on the hub, OWNER/NAME. private: where it is made anew, and required where it is there; branch: other
    than main; token: without one, HF_TOKEN or what `hf auth login` keeps.
    """

    name: str
    private: bool = False
    token: str | None = field(default=None, repr=False)
    branch: str | None = None

    def __post_init__(self) -> None:
        if self.name.count("/") != 1 or not all(self.name.split("/")):
            raise InputError(f"'{self.name}' is no repository of the hub: OWNER/NAME is expected")

    def require_other(self, dense: str | None) -> None:
        """Raises InputError when what was pruned lies there, and would be overwritten."""
        if dense is not None and dense.lower() == self.name.lower() and self.branch in (None, MAIN):
            raise InputError(
                f"{self.name} is the dense model itself; choose another repository, or another branch: "
                f"obsprune push DIRECTORY {self.name} --revision BRANCH"
            )

    def prepare(self) -> None:
        """Makes the repository where there is none, and makes sure that it can be written. Raises InputError."""
        with self._explained():
            self._api.whoami()
            self._api.create_repo(self.name, private=self.private or None, exist_ok=True)
            self._api.auth_check(self.name, write=True)
            if self.private and not self._api.model_info(self.name).private:
                raise InputError(
                    f"{self.name} is there and public; make it private in its settings on the hub, or drop --private"
                )
            if self.branch not in (None, MAIN):
                self._api.create_branch(self.name, branch=self.branch, exist_ok=True)

    def upload(self, files: Mapping[str, Path | bytes], message: str, progress: Progress) -> str:
        """One commit with these files, {name: where it is, or what is in it}; weights that a former upload left are
        removed by it. What was sent before an error is not sent again. Returns the address. Raises InputError.
        """
        additions = [CommitOperationAdd(name, held) for name, held in files.items()]
        progress.stage(f"uploading to {self.name}", len(additions))
        with self._explained(), _without_bars():
            stale = self._stale(files)
            for addition in additions:
                progress.detail(addition.path_in_repo)
                self._api.preupload_lfs_files(self.name, [addition], revision=self.branch, free_memory=False)
                progress.step(addition.path_in_repo)
            deletions = [CommitOperationDelete(name) for name in stale]
            self._api.create_commit(self.name, [*additions, *deletions], commit_message=message, revision=self.branch)
        if stale:
            progress.notice(f"weights that were there before are removed from {self.name}: {', '.join(stale)}")
        tree = f"/tree/{self.branch}" if self.branch not in (None, MAIN) else ""
        return f"{self._api.endpoint}/{self.name}{tree}"

    def _stale(self, files: Mapping[str, Path | bytes]) -> list[str]:
        there = self._api.list_repo_files(self.name, revision=self.branch)
        weights = (name for name in there if any(fnmatch(name, pattern) for pattern in STALE))
        return sorted(name for name in weights if "/" not in name and name not in files)

    @property
    def _api(self) -> HfApi:
        return HfApi(token=self.token, library_name="obsprune", library_version=__version__)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            raise InputError(self._told(error)) from error

    def _told(self, error: BaseException) -> str:
        """The fact and the way out."""
        if isinstance(error, HFValidationError):
            return f"'{self.name}' is no repository of the hub: {first_line(error)}"
        if isinstance(error, LocalTokenNotFoundError):
            return f"there is no access token for the hub: {TOKEN_HELP}"
        answer = next((one for one in _chain(error) if isinstance(one, HfHubHTTPError)), None)
        status = answer.response.status_code if answer is not None else None
        if status in REFUSALS:
            return REFUSALS[status].format(repo=self.name)
        said = first_line(answer or error)
        if status is None and any(isinstance(one, HTTPError | OSError) for one in _chain(error)):
            return f"the hub cannot be reached: no network, or HF_HUB_OFFLINE is set ({said})"
        return f"the hub does not take {self.name}: {said}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def _without_bars() -> Iterator[None]:
    """Progress is ours to show."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
