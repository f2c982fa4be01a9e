"""Release."""

from pydantic import Field

from sdxl_pipeline.project.settings_model import SettingsModel


class ReleaseSettings(SettingsModel):
    """Release."""

    push_to_hub: bool = Field(False, description="Upload the release to the Hugging Face Hub.")
    hub_model_id: str | None = Field(
        None,
        pattern=r"^([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*$",
        description='Repository, "name" or "owner/name"; not set: the project\'s name.',
    )
    model_card_private: bool = Field(True, description="Create the repository as private.")
    model_card_note: str | None = Field(None, description="A note at the top of the model card.")
