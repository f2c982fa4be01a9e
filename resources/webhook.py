"""The webhooks that receive a training's messages and images: chat channels and HTTP endpoints."""

from pathlib import Path

import dagster as dg
from pydantic import Field

from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.webhook import load_webhooks, webhook_environment


class WebhookResource(dg.ConfigurableResource):
    """The webhooks of this deployment. Their addresses are secrets: they are stored in a separate file, never in a field here."""

    config_path: str | None = Field(
        default=None,
        description="JSON file of webhooks for projects whose config.json has no webhook_config, in the same format.",
    )

    def environment(self, settings: TrainingSettings) -> dict[str, str]:
        """Return the webhooks as environment variables for `LocalStageClient.run_stage(environment=...)`.

        The addresses are passed this way and never written to a spec. Raise `dagster.Failure` for an invalid file.
        """
        path = settings.webhook_config or self.config_path
        try:
            return webhook_environment(load_webhooks(Path(path).expanduser() if path else None))
        except ProjectError as error:
            raise dg.Failure(str(error), allow_retries=False) from error
