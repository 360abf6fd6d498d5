"""A model of the Hugging Face Hub, read by ranges through ``huggingface_hub``'s own session.

Token, endpoint, cache and offline mode are that library's (``HF_TOKEN``, ``HF_ENDPOINT``,
``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``); 0.36 speaks through requests, 1.x through httpx,
and 2.x through httpx2.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nxdi_expertscale.errors import CheckpointError, ConfigurationError
from nxdi_expertscale.sources.folder import Folder, open_folder
from nxdi_expertscale.sources.remote import (
    TIMEOUT_SECONDS,
    Remote,
    RemoteFile,
    TransientError,
)

HUB_SCHEME = "hf://"
"""What a model's name in a manifest begins with."""

_PIECE_BYTES = 1 << 20

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that may be over at the next attempt."""


def open_hub(model: str, revision: str | None, spool: Path | None) -> Remote | Folder:
    """Open a model of the Hub at a revision, pinned to its commit.

    Args:
        model: ``org/name``.
        revision: A branch, tag or commit; the main branch by default.
        spool: Folder for what is read.

    Returns:
        The model behind the network, or its folder in the Hub's cache where ``HF_HUB_OFFLINE``
        is set.

    Raises:
        CheckpointError: There is no such model or revision, or it may not be read.
        ConfigurationError: ``huggingface_hub`` is not installed.
    """
    try:
        hub: Any = importlib.import_module("huggingface_hub")
        for part in ("constants", "errors", "utils"):
            importlib.import_module(f"huggingface_hub.{part}")
    except ImportError:
        raise ConfigurationError(
            f"{model}: there is no folder of this name here, and reading a model of the Hub of "
            "this name needs huggingface_hub: pip install 'nxdi-expertscale[hub]'"
        ) from None
    if hub.constants.HF_HUB_OFFLINE:
        return _open_cached(hub, model, revision)
    return Remote(_Hub(hub, model, revision), spool)


def _open_cached(hub: Any, model: str, revision: str | None) -> Folder:
    try:
        snapshot = hub.snapshot_download(model, revision=revision, local_files_only=True)
    except (hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError):
        raise CheckpointError(
            f"{model}: there is no folder of this name here, HF_HUB_OFFLINE is set, and the Hub's "
            "cache does not have it; download it first, or unset HF_HUB_OFFLINE"
        ) from None
    folder = open_folder(snapshot)
    return Folder(folder.path, origin=_origin(model, folder.path.name))


def _origin(model: str, commit: str) -> str:
    return f"{HUB_SCHEME}{model}@{commit}"


class _Hub:
    """The Hub as a :class:`~nxdi_expertscale.sources.remote.Transport`."""

    def __init__(self, hub: Any, model: str, revision: str | None) -> None:
        self._hub = hub
        self._model = model
        self._revision = revision
        self._commit = ""
        self.path = model if revision is None else f"{model}@{revision}"

    @property
    def origin(self) -> str:
        """The model and the commit that its files are read from."""
        return _origin(self._model, self._commit)

    def files(self) -> Mapping[str, RemoteFile]:
        """The files at the top of the repository; the revision is its commit from now on."""
        with self._translated():
            info = self._hub.HfApi().model_info(
                self._model,
                revision=self._revision,
                files_metadata=True,
                timeout=TIMEOUT_SECONDS,
            )
        self._model, self._commit = info.id, info.sha
        return {
            file.rfilename: RemoteFile(
                file.size, file.lfs.sha256 if file.lfs else str(file.blob_id)
            )
            for file in info.siblings
            if "/" not in file.rfilename
        }

    @contextmanager
    def stream(self, name: str, offset: int, length: int) -> Iterator[Iterator[bytes]]:
        """The bytes of a range of a file, in pieces."""
        url = self._hub.hf_hub_url(self._model, name, revision=self._commit)
        headers = {
            **self._hub.utils.build_hf_headers(),
            "Range": f"bytes={offset}-{offset + length - 1}",
            # Sizes and offsets are those of the file as it is.
            "Accept-Encoding": "identity",
        }
        with self._translated(), _get(self._hub.utils.get_session(), url, headers) as response:
            self._hub.utils.hf_raise_for_status(response)
            if response.status_code != 206 and offset:
                raise CheckpointError(
                    f"{self.path}/{name}: the server does not give a part of a file; download the "
                    "model and name its folder"
                )
            yield _chunks(response)

    def cached(self, name: str) -> Path | None:
        """A file of the Hub's cache, of this very commit."""
        found = self._hub.try_to_load_from_cache(self._model, name, revision=self._commit)
        return Path(found) if isinstance(found, str) else None

    def close(self) -> None:
        """The library keeps its connections, for all who use it."""

    @contextmanager
    def _translated(self) -> Iterator[None]:
        errors = self._hub.errors
        try:
            yield
        except errors.GatedRepoError:
            raise CheckpointError(
                f"{self.path}: is gated, and this token may not read it; accept its conditions on "
                "its page and set HF_TOKEN, or run: hf auth login"
            ) from None
        except errors.RevisionNotFoundError:
            raise CheckpointError(
                f"{self.path}: the model has no revision {self._revision}; name a branch, a tag "
                "or a commit of it"
            ) from None
        except errors.RepositoryNotFoundError:
            raise CheckpointError(
                f"{self.path}: there is no folder of this name here, and no model on the Hub that "
                "this token may read; look at the name, or set HF_TOKEN"
            ) from None
        except errors.HFValidationError as error:
            raise CheckpointError(
                f"{self.path}: is neither a folder nor a model's name on the Hub ({error})"
            ) from None
        except _network_errors(self._hub.utils.get_session()) as error:
            response: Any = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            if status is None:
                raise TransientError(f"the connection failed ({type(error).__name__})") from error
            if status in _TRANSIENT:
                raise TransientError(
                    f"the server answers {status}", _seconds(response.headers)
                ) from error
            raise CheckpointError(
                f"{self.path}: the Hub answers {status} and does not give it; look at the name and "
                "at HF_TOKEN"
            ) from None


def _network_errors(session: Any) -> tuple[type[Exception], ...]:
    """What a request may raise: the errors of requests are OSError, those of httpx its own."""
    library = importlib.import_module(type(session).__module__.partition(".")[0])
    return OSError, library.HTTPError


def _seconds(headers: Mapping[str, str]) -> float | None:
    """What ``Retry-After`` asks for, where it is a number."""
    value = headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else None


@contextmanager
def _get(session: Any, url: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """The answer to a GET, its body not read yet, with requests or httpx."""
    if callable(getattr(session, "stream", None)):
        with session.stream(
            "GET", url, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True
        ) as response:
            if response.status_code >= 400:
                # What is wrong stands in the body, which the library looks at.
                response.read()
            yield response
        return
    with session.get(url, headers=headers, timeout=TIMEOUT_SECONDS, stream=True) as response:
        yield response


def _chunks(response: Any) -> Iterator[bytes]:
    if hasattr(response, "iter_content"):
        yield from response.iter_content(_PIECE_BYTES)
    else:
        yield from response.iter_bytes(_PIECE_BYTES)
