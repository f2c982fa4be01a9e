"""Where a training's messages and images go: chat channels and programs that listen at an address."""

from pathlib import Path

import dagster as dg
from pydantic import Field

from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.webhook import in_environment, load_webhooks


class WebhookResource(dg.ConfigurableResource):
    """The webhooks of this deployment. Their addresses are secrets: they stand in a file of their own, never in a field here."""

    config_path: str | None = Field(
        default=None,
        description="JSON file of webhooks for projects whose config.json has no webhook_config, in the same form.",
    )

    def environment(self, settings: TrainingSettings) -> dict[str, str]:
        """What the training process needs in its environment; for `LocalStageClient.run(environment=...)`.

        So the addresses reach it wherever it runs, and stand in no spec. Raises `dagster.Failure` for a file that cannot be used.
        """
        named = settings.webhook_config or self.config_path
        try:
            return in_environment(load_webhooks(Path(named).expanduser() if named else None))
        except ProjectError as error:
            raise dg.Failure(str(error), allow_retries=False) from error
