"""What was learned onto the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from sfumato import shell
from sfumato.errors import ConfigError
from sfumato.runs.folder import card_pictures


def push(folder: Path, learned: Path, repository: str) -> str:
    """Upload what was learned, a file or a model's folder, its card and the card's pictures to the hub; returns the
    address. Nothing else of the run's folder leaves the machine. Raises ConfigError."""
    from huggingface_hub import HfApi

    api = HfApi()
    name = learned.name.replace("[", "[[]")  # "[v2]" is one of two letters to the hub
    patterns = [f"{name}/*" if learned.is_dir() else name, "README.md", *card_pictures(folder)]
    try:
        api.create_repo(repository, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=patterns,
            commit_message=f"Upload {learned.name if learned.is_dir() else learned.stem}",
        )
    except Exception as error:  # the hub's library has changed its network library twice; there is no common error
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        words = ["hf", "upload", repository, str(folder), ".", *(w for each in patterns for w in ("--include", each))]
        raise ConfigError(
            f"--push-to-hub {repository}: {reason}. What was learned is safe in {learned}; log in with `hf auth login` "
            f"and upload it with `{shell.join(words)}`."
        ) from None
    return str(commit.commit_url)
