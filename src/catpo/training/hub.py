"""The trained model on the hub. Its repository is made before the training, so that what is wrong is told at once."""

from __future__ import annotations

from pathlib import Path

import httpx2
from huggingface_hub import HfApi

from catpo.config.options import TrainOptions
from catpo.core.errors import UserError, first_line
from catpo.training.arguments import passed_on

FAILURES = (OSError, ValueError, httpx2.HTTPError)
"""What the hub's client raises over a name, a token, or a server."""


def problem_with_repository(options: TrainOptions) -> str | None:
    """Makes the repository unless it is there, if there is one; returns what is wrong, as a message, or None."""
    given = passed_on(options)
    if not given.get("push_to_hub"):
        return None
    name = given["hub_model_id"]
    try:
        HfApi().create_repo(name, private=given.get("hub_private_repo"), exist_ok=True)
        if (revision := given.get("hub_revision")) is not None:
            HfApi().create_branch(name, branch=revision, exist_ok=True)
    except FAILURES as error:
        return (
            f"push_to_hub: the repository '{name}' cannot be made on the hub: {first_line(error)} Set HF_TOKEN, or leave "
            "push_to_hub out and upload the model later: `hf upload`."
        )
    return None


def push(options: TrainOptions, model: Path) -> None:
    """Uploads the trained model, if that is asked for.

    Raises:
        UserError: the hub does not take it; says how to upload it.
    """
    given = passed_on(options)
    if not given.get("push_to_hub"):
        return
    name, revision = given["hub_model_id"], given.get("hub_revision")
    try:
        HfApi().upload_folder(repo_id=name, folder_path=model, revision=revision, commit_message="Model trained by catpo")
    except FAILURES as error:
        raise UserError(
            f"{model} is complete, but the hub does not take it: {first_line(error)} Upload it later: "
            f"`hf upload {name} {model}{f' --revision {revision}' if revision else ''}`."
        ) from error
