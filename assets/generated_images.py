"""Images of a project that generates its own data: the demo, which has a generate_data.json."""

import dagster as dg

from assets.asset_keys import asset_attributes, project_key, version
from resources.storage import full_disk_as_failure
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.demo.demo_dataset import REQUEST_FILE, generate_if_requested
from sdxl_pipeline.files.atomic_files import sha256_file

CODE = "1"


def generates_images(project: Project) -> bool:
    """Return whether the project has a generate_data.json."""
    return (project.folder / REQUEST_FILE).is_file()


def build_generated_images(project: Project) -> dg.AssetsDefinition:
    """Return `<project>/generated_images`; its data version is the digest of generate_data.json, which determines the images."""
    request = sha256_file(project.folder / REQUEST_FILE)

    @dg.asset(
        key=project_key(project, "generated_images"),
        **asset_attributes(project, "data", "python"),
        code_version=version(CODE, request),
        description=f"The image folders that {REQUEST_FILE} describes, generated if they do not exist yet.",
    )
    def generated_images() -> dg.MaterializeResult:
        try:
            with full_disk_as_failure():
                folder = generate_if_requested(project.folder)
        except (ValueError, FileExistsError) as error:  # an invalid file, or a folder that was not generated
            raise dg.Failure(description=str(error), allow_retries=False) from error
        return dg.MaterializeResult(
            data_version=dg.DataVersion(sha256_file(project.folder / REQUEST_FILE)),
            metadata={"folder": dg.MetadataValue.path(str(folder))},
        )

    return generated_images
