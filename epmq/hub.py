"""Models by name: a local path, or an id of the Hugging Face hub whose files are fetched into its cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from epmq import trust
from epmq.errors import SourceError, first_line

# Weights, configurations and tokenizers; never code, pickles or another framework's weights.
FETCHED = (
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.spm", "vocab.txt", "merges.txt", "bpe.codes", "dict.txt",
    "prophetnet.tokenizer",
)  # fmt: skip
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]+)")


def find_model(what: str | Path, folder: str | Path = ".") -> Path:
    """Where a model's files are: ``what`` below ``folder`` if that exists, else the snapshot of the hub id ``what``.

    An id is ``org/name`` or ``org/name@revision``. It is looked up in the local cache and fetched when it is not there;
    only the files that FETCHED names are taken. A name whose first part is a folder here is meant as a path.

    Raises SourceError when there is neither such a path nor such an id, or when the hub cannot be reached.
    """
    found = Path(folder) / what
    if trust.exists(found):
        return found
    text = os.fspath(what)
    if not _ID.fullmatch(text) or ".." in text or trust.exists(Path(folder) / text.split("/")[0]):
        raise SourceError(f"there is no such file or folder: {found}.")
    try:
        return _fetch(*text.partition("@")[::2])
    except SourceError as error:
        raise SourceError(f"there is no such file or folder: {found}; and {error}") from error.__cause__


def name_of(path: str | Path) -> str:
    """What to call a model in a report: hub id and revision if it lies in the hub's cache, else its folder's name."""
    found = _SNAPSHOT.search(Path(path).as_posix())
    return f"{found[1]}/{found[2]}@{found[3][:12]}" if found else Path(path).resolve().name


def _fetch(name: str, revision: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise SourceError(f"the hub id {name!r} needs huggingface_hub: pip install 'epmq[hf]'.") from error
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(FETCHED)))
    except errors.GatedRepoError as error:
        raise SourceError(
            f"the hub gives {name!r} only to those who accepted its terms; log in as one of them (hf auth login)."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"the hub knows no model {name!r}; check the name, or log in if it is private (hf auth login)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"the hub knows no revision {revision!r} of {name!r}.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise SourceError(
            f"the hub id {name!r} is not in the local cache and the hub cannot be reached; give a local folder."
        ) from error
    except Exception as error:  # The client lets the errors of whichever HTTP library it uses through.
        raise SourceError(f"the hub id {name!r} cannot be fetched ({first_line(error)}).") from error
