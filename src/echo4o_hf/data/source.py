"""Where the files of a copy of Echo-4o-Image come from: a folder, or a repository on the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import huggingface_hub
from datasets import DownloadConfig
from datasets.utils.file_utils import xopen
from huggingface_hub.errors import RevisionResolutionError

from .archives import digest
from .layout import find_subsets, folder_patterns


@dataclass
class Folder:
    """A copy in a local folder; what its files are is known by size and time of change.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    root: str

    def __post_init__(self) -> None:
        self.root = os.path.abspath(os.path.expanduser(self.root))
        if not os.path.isdir(self.root):
            raise FileNotFoundError(f"data_dir is not a folder: {self.root}")
        self.name = os.path.basename(self.root)

    def files(self) -> list[str]:
        """All files, relative to the folder."""
        found = (Path(folder, name) for folder, _, names in os.walk(self.root, followlinks=True) for name in names)
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def state(self) -> str:
        """Changes when a file of a subset does."""
        subsets = find_subsets(self.files(), self.name).values()
        paths = [
            path for files in subsets for path in (*files.metadata, *files.archives, *files.pictures, *files.tables)
        ]
        return digest("\n".join(self.identity(path) for path in paths))

    def identity(self, path: str) -> str:
        """Changes when the file does."""
        real = os.path.realpath(self.local(path))
        status = os.stat(real)
        return f"{real} {status.st_size} {status.st_mtime_ns}"

    def local(self, path: str) -> str:
        """A path on this machine."""
        return os.path.join(self.root, path)

    def open(self, path: str) -> IO[bytes]:
        """For reading from beginning to end."""
        return open(self.local(path), "rb")

    open_anywhere = open


@dataclass
class Repository:
    """A dataset repository at one commit, whose files are read over the network."""

    repo_id: str
    commit: str
    token: str | bool | None = field(repr=False)

    def __post_init__(self) -> None:
        self.name = self.repo_id.split("/")[-1]

    def files(self) -> list[str]:
        """All files in the repository."""
        api = huggingface_hub.HfApi(token=self.token)
        return sorted(api.list_repo_files(self.repo_id, repo_type="dataset", revision=self.commit))

    def state(self) -> str:
        """Says which files these are."""
        return f"{self.repo_id}@{self.commit}"

    def download(self, subsets: Iterable[str]) -> Folder:
        """A local copy of some subsets: resumed where it was interrupted, kept, and then found without network."""
        patterns = [pattern for subset in subsets for pattern in folder_patterns(subset)]
        return Folder(
            huggingface_hub.snapshot_download(
                self.repo_id,
                repo_type="dataset",
                revision=self.commit,
                token=self.token,
                allow_patterns=patterns,
            )
        )

    def identity(self, path: str) -> str:
        """Changes when the file does."""
        return f"{self.repo_id}@{self.commit}/{path}"

    def local(self, path: str) -> str:
        """A path on this machine, after downloading unless it was."""
        return huggingface_hub.hf_hub_download(
            self.repo_id, path, repo_type="dataset", revision=self.commit, token=self.token
        )

    def open(self, path: str) -> IO[bytes]:
        """For reading from beginning to end, without storing it."""
        return self._open(path, block_size=0)

    def open_anywhere(self, path: str) -> IO[bytes]:
        """For reading parts of it, without storing it."""
        return self._open(path)

    def _open(self, path: str, **options: int) -> IO[bytes]:
        url = f"hf://datasets/{self.repo_id}@{self.commit}/{path}"
        return xopen(url, "rb", download_config=DownloadConfig(token=self.token), **options)


def open_source(data_dir: str | None, repo_id: str, revision: str, token: str | bool | None) -> Folder | Repository:
    """The folder `data_dir`, or the repository at the commit that `revision` means now, offline meant last.

    Raises:
        OSError: the Hub does not answer, and the commit is not known from before.
    """
    if data_dir is not None:
        return Folder(data_dir)
    api = huggingface_hub.HfApi(token=token)
    try:
        commit = api.resolve_revision(repo_id, repo_type="dataset", revision=revision)
    except RevisionResolutionError as error:
        offline = huggingface_hub.is_offline_mode()
        why = "HF_HUB_OFFLINE is set" if offline else f"the Hub cannot be asked ({error.__cause__ or error})"
        raise OSError(
            f"{repo_id} (revision {revision!r}) is not in the Hub's cache, and {why}: give a copy as data_dir."
        ) from error
    return Repository(repo_id, commit.resolved, token)
