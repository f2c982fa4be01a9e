"""Validation of a model card's metadata by the Hub, before anything is uploaded."""

import logging
from collections.abc import Callable
from typing import Final

from sdxl_pipeline.hub_client import describe_hub_error, without_secrets
from sdxl_pipeline.release.release_inputs import ReleaseError

TIMEOUT_SECONDS: Final = 10.0

logger = logging.getLogger(__name__)


def validate_card(
    card: str, endpoint: str | None = None, report: Callable[[str], object] = logger.warning
) -> None:
    """Send a model card to the Hub's validation, as `huggingface_hub.ModelCard.validate` does, but at `endpoint`.

    Raise ReleaseError with the Hub's reasons when it rejects the metadata (HTTP 400). Its warnings, and a Hub that does not answer, are only
    reported: the upload validates again.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import hf_raise_for_status

    url = f"{endpoint or constants.ENDPOINT}/api/validate-yaml"
    try:
        response = get_session().post(
            url,
            json={"repoType": "model", "content": card},
            headers={"Accept": "text/plain"},
            timeout=TIMEOUT_SECONDS,
        )
        if response.status_code != 400:
            hf_raise_for_status(response)
        answer = response.json()
    except Exception as error:  # of the HTTP library, of the client, or an answer that is not JSON
        report(f"The metadata of the model card was not validated: {describe_hub_error(error)} ({url}).")
        return
    if warnings := _messages(answer, "warnings"):
        report(f"The Hub's warnings about the metadata of the model card: {warnings}")
    if response.status_code == 400:
        raise ReleaseError(
            f"the Hub rejects the metadata of the model card: {_messages(answer, 'errors') or 'it gives no reason'}. Correct the named "
            "values in config.json: instance_prompt, validation prompts, the base model or hub_model_id"
        )


def _messages(answer: object, kind: str) -> str:
    entries = answer.get(kind, []) if isinstance(answer, dict) else []
    texts = [str(entry.get("message", entry) if isinstance(entry, dict) else entry) for entry in entries]
    return without_secrets("; ".join(text.strip() for text in texts))
