"""A project made from a release's lineage trains the same run, and every difference is reported; the training itself is a slow test."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sdxl_pipeline.cli import dagster_command, reproduce
from sdxl_pipeline.cli.main import main
from sdxl_pipeline.config.hardware_profiles import PRESETS
from sdxl_pipeline.config.loader import PROJECTS_VARIABLE, Project, load_project
from sdxl_pipeline.config.resolve import resolve_settings
from sdxl_pipeline.data.scan.dataset_fingerprint import dataset_digest, rows_digest
from sdxl_pipeline.files.atomic_files import sha256_file
from sdxl_pipeline.models.base_model import resolve_base_model
from sdxl_pipeline.release.lineage import datasets_without_location, plain_overrides, release_lineage
from sdxl_pipeline.release.release_inputs import portable_lineage, portable_settings
from sdxl_pipeline.release.reproduce import (
    ReproduceError,
    compare_environment,
    compare_inputs,
    compare_weights,
    read_release,
    write_project,
)
from sdxl_pipeline.runtime.specs import Ancestor, SettingDifference, TrainedLora, TrainSpec, ValidationPrompt
from sdxl_pipeline.training.checkpoint.run_identity import settings_affecting_weights
from tests.support.asset_graph import materialize
from tests.support.hub_server import HubServer

REPOSITORY = Path(__file__).parents[2]
IDENTITY = "ab" * 32


def trained(folder: Path, **changes: Any) -> TrainedLora:
    weights = folder / "run" / "pytorch_lora_weights.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(b"weights")
    values = {
        "identity": IDENTITY, "run_dir": str(weights.parent), "weights_path": str(weights), "weights_sha256": sha256_file(weights),
        "steps": 3, "epochs": 1, "samples": 6, "resumed_from_step": None, "reused": False, "final_loss": 0.1, "seconds": 1,
        "steps_per_second": 1, "peak_memory_bytes": 1, "trainable_parameters": 1, "adapted_modules": 1, "metrics_path": "",
        "loss_curve_path": "", "validation_sheet_path": None, "validation_images": (),
    }  # fmt: skip
    return TrainedLora.model_validate(values | changes)


def write_release(
    project: Project, folder: Path, data_versions: dict[str, str] | None = None, **changes: Any
) -> Path:
    """Write the two files that `reproduce` reads, as the release has them."""
    settings, _ = resolve_settings(project.training, PRESETS["cpu"], {}, project.folder)
    model = resolve_base_model(settings, project.folder)
    lora = trained(folder, **changes)
    spec = TrainSpec(
        base_model=model,
        hardware=PRESETS["cpu"],
        settings=settings,
        datasets=(),
        prompts=tuple(ValidationPrompt(**prompt._asdict()) for prompt in project.prompts),
        run_dir=lora.run_dir,
        project=project.name,
    )
    lineage = portable_lineage(release_lineage(project, model, data_versions or {}, lora, spec))
    release = folder / "release"
    release.mkdir(parents=True, exist_ok=True)
    (release / "lineage.json").write_text(
        json.dumps({**lineage, "images": {"shapes": {"trained": 6, "held_out": 2}}})
    )
    (release / "training_config.json").write_text(json.dumps(portable_settings(settings)))
    return release


LYCORIS = {"lora_type": "lycoris", "lycoris_config": "lycoris.json"}


@pytest.mark.parametrize(
    ("config", "dataset"),
    [
        ({}, {}),
        ({"resolution": 256, "max_upscale_threshold": 0.2, "caption_strategy": "filename"}, {"repeats": 2}),
        (LYCORIS, {"crop_aspect": "closest", "crop_aspect_buckets": [1.0, 1.5]}),
        (
            {
                "validation_prompt_library": True,
                "use_ema": True,
                "num_train_epochs": 2,
                "max_train_steps": None,
            },
            {},
        ),
    ],
)
def test_project_of_release_has_the_same_settings(make_project, tmp_path: Path, config: Any, dataset: Any):
    source = make_project(config={"user_prompt_library": "prompts.json", **config}, dataset=dataset)
    (source / "prompts.json").write_text(
        json.dumps({"dog": "a dog", "cat": {"prompt": "a cat", "negative_prompt": "b"}})
    )
    (source / "lycoris.json").write_text(
        json.dumps({"algo": "lokr", "linear_dim": 4, "linear_alpha": 1, "factor": 4})
    )
    project = load_project(source)
    run = read_release(str(write_release(project, tmp_path / "out")))
    assert write_project(tmp_path / "again", run, {"shapes": str(source / "data")}, {}) == []
    again = load_project(tmp_path / "again")
    settings = [resolve_settings(p.training, PRESETS["cpu"], {}, p.folder)[0] for p in (project, again)]
    assert settings_affecting_weights(settings[0]) == settings_affecting_weights(settings[1])
    assert project.datasets == again.datasets
    assert project.prompts == again.prompts


def test_lineage_contains_no_paths_and_addresses(make_project, tmp_path: Path):
    (tmp_path / "table.csv").write_text("url,caption\n")
    for name, dataset in (
        ("bucket", {"type": "aws", "url": "s3://secret-bucket/photos", "instance_data_dir": ""}),
        ("list", {"type": "csv", "csv_file": str(tmp_path / "table.csv"), "csv_cache_dir": str(tmp_path), "instance_data_dir": ""}),
        ("table", {"caption_strategy": "parquet", "parquet": {"path": str(tmp_path / "captions.parquet")}}),
        ("filters", {"caption_filter_list": str(tmp_path / "filters.txt"), "cache_dir_vae": str(tmp_path / "vae")}),
    ):  # fmt: skip
        (tmp_path / "filters.txt").write_text("word\n")
        project = load_project(make_project(name, images=2, dataset=dataset))
        text = (write_release(project, tmp_path / name) / "lineage.json").read_text()
        assert str(tmp_path) not in text
        assert "secret-bucket" not in text
    assert plain_overrides(
        trained(tmp_path, overrides=(SettingDifference(setting="seed", configured="1", used="2"),))
    ) == {"seed": {"configured": 1, "used": 2}}


@pytest.fixture
def release(make_project: Callable[..., Path], tmp_path: Path) -> Path:
    return write_release(load_project(make_project()), tmp_path / "out")


@pytest.mark.parametrize(
    ("data", "paths", "message"),
    [
        ({}, {}, r"images of shapes \(a folder\); add --data ID=LOCATION"),
        ({"shapes": "nowhere"}, {}, "--data shapes=nowhere is not a folder"),
        ({"shape": "."}, {}, "--data shape is not a dataset of the release; it has shapes"),
        ({"shapes": "."}, {"seed": "1"}, "--path seed is not a setting with a path"),
    ],
)
def test_missing_or_unknown_locations_are_errors(
    release: Path, tmp_path: Path, data: Any, paths: Any, message: str
):
    with pytest.raises(ReproduceError, match=message):
        write_project(tmp_path / "again", read_release(str(release)), data, paths)
    assert not (tmp_path / "again").exists()


def change(release: Path, file: str, **values: Any) -> None:
    content = json.loads((release / file).read_text())
    (release / file).write_text(json.dumps(content | values))


def test_local_model_and_warm_start_need_their_paths(release: Path, tmp_path: Path):
    change(release, "training_config.json", pretrained_model_name_or_path="mine.safetensors")
    data = {"shapes": str(tmp_path)}
    with pytest.raises(
        ReproduceError, match=r"local file or folder mine\.safetensors; add --path pretrained_model"
    ):
        write_project(tmp_path / "again", read_release(str(release)), data, {})
    paths = {"pretrained_model_name_or_path": "bundled:tiny-sdxl"}
    ancestor = Ancestor(identity=IDENTITY, step=2, same_trajectory=False, takes_optimizer=True).model_dump()
    change(release, "lineage.json", ancestor=ancestor)
    with pytest.raises(ReproduceError, match="started from step 2 of run abababababababab"):
        write_project(tmp_path / "again", read_release(str(release)), data, paths)
    change(release, "lineage.json", ancestor=ancestor | {"same_trajectory": True})
    change(release, "training_config.json", pretrained_evaluation_model_name_or_path="clip")
    (note,) = write_project(tmp_path / "again", read_release(str(release)), data, paths)
    assert note.startswith("pretrained_evaluation_model_name_or_path was the local file or folder clip")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["pretrained_model_name_or_path"] == "bundled:tiny-sdxl"


def test_hub_model_is_pinned_and_uploads_are_off(release: Path, tmp_path: Path):
    change(
        release,
        "training_config.json",
        pretrained_model_name_or_path="owner/model",
        push_to_hub=True,
        report_to=["wandb"],
    )
    change(release, "lineage.json", base_model_revision="c0ffee")
    write_project(tmp_path / "again", read_release(str(release)), {"shapes": str(tmp_path)}, {})
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["revision"] == "c0ffee"
    assert not {"push_to_hub", "report_to", "hub_model_id"} & config.keys()


def test_other_project_is_not_overwritten_but_an_earlier_attempt_is(
    release: Path, tmp_path: Path, make_project
):
    other = make_project("other")
    before = (other / "config.json").read_bytes()
    with pytest.raises(ReproduceError, match="is another project and is not overwritten"):
        write_project(other, read_release(str(release)), {"shapes": str(tmp_path)}, {})
    assert (other / "config.json").read_bytes() == before
    for location in (tmp_path, other):
        write_project(tmp_path / "again", read_release(str(release)), {"shapes": str(location)}, {})
    assert load_project(tmp_path / "again").datasets[0].instance_data_dir == other


def test_folder_without_release_or_of_an_earlier_version_is_refused(release: Path, tmp_path: Path):
    with pytest.raises(ReproduceError, match=r"has no lineage\.json, so it is not a release"):
        read_release(str(tmp_path))
    with pytest.raises(ReproduceError, match="neither a folder nor a Hub id"):
        read_release("nowhere")
    lineage = json.loads((release / "lineage.json").read_text())
    del lineage["datasets"]
    (release / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(ReproduceError, match="lacks datasets: an earlier version wrote it"):
        read_release(str(release))


def test_release_on_the_hub_is_read_without_its_weights(release: Path, tmp_path: Path, monkeypatch):
    (release / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    with HubServer() as hub:
        hub.adopt_process(monkeypatch, tmp_path / "hf")
        hub.add_repo("someone/zorp", release)
        assert read_release("someone/zorp") == read_release(str(release))
        assert "pytorch_lora_weights.safetensors" not in {path.name for path in (tmp_path / "hf").rglob("*")}
        with pytest.raises(ReproduceError, match="someone/other is not a repository of the Hub"):
            read_release("someone/other")


SCAN = pd.DataFrame({"path": ["a", "b"], "status": ["kept", "dropped"], "key": ["1", "2"], "height": [8, 8], "width": [8, 8], "captions": [["x"], []]})  # fmt: skip


def rows() -> pd.DataFrame:
    from sdxl_pipeline.data.buckets.crop_plan import ROW_COLUMNS

    text = {"path", "key", "split", "bucket"}
    return pd.DataFrame({name: ["a"] if name in text else [1] for name in ROW_COLUMNS})


@pytest.fixture
def reproduced(make_project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolated_storage: Path):
    """A release and the values of the project that reproduces it, without a training."""
    source = load_project(make_project())
    data_versions = {
        "small/shapes_dataset": dataset_digest(SCAN), "small/shapes_aspect_buckets": rows_digest(rows()),
    }  # fmt: skip
    release = write_release(source, tmp_path / "out", data_versions)
    values = isolated_storage / "values" / "again"
    values.mkdir(parents=True)
    SCAN.to_parquet(values / "shapes_dataset.parquet")
    rows().to_parquet(values / "shapes_aspect_buckets.parquet")
    model = resolve_base_model(source.training, source.folder)
    (values / "base_model.json").write_text(model.model_dump_json())
    (values / "lora.json").write_text(trained(tmp_path / "again").model_dump_json())
    monkeypatch.setenv(PROJECTS_VARIABLE, str(tmp_path / "projects"))
    return release, values, source.folder / "data"


def test_compare_inputs_names_component_and_dataset(reproduced):
    release, values, data = reproduced
    run = read_release(str(release))
    again = values.parents[1] / "again"
    write_project(again, run, {"shapes": str(data)}, {})
    project = load_project(again)
    assert compare_inputs(run, project, values.parent) == []
    SCAN.assign(captions=[["y"], []]).to_parquet(values / "shapes_dataset.parquet")
    model = json.loads((values / "base_model.json").read_text())
    model["digests"]["unet"] = "f" * 64
    (values / "base_model.json").write_text(json.dumps(model))
    model_difference, data_difference = compare_inputs(run, project, values.parent)
    assert model_difference.startswith("base model: unet differs: ")
    assert model_difference.endswith("in the release, ffffffffffffffff here")
    assert data_difference.startswith("dataset shapes: images or captions differ: ")
    assert data_difference.endswith("(1 images here, 8 in the release)")
    (values / "shapes_aspect_buckets.parquet").unlink()
    assert compare_inputs(run, project, values.parent)[-1].endswith("in the release, missing here")


def test_compare_weights_finds_the_released_step(tmp_path: Path, release: Path):
    run = read_release(str(release))
    assert compare_weights(run, trained(tmp_path / "x"))[0]
    longer = trained(tmp_path / "x", steps=9)
    same, sentence = compare_weights(run, longer)
    assert not same
    assert "has no checkpoint of it" in sentence
    checkpoint = tmp_path / "x" / "run" / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    assert compare_weights(run, longer)[0]
    (checkpoint / "pytorch_lora_weights.safetensors").write_bytes(b"others!")
    assert "a version computes other last bits" in compare_weights(run, longer)[1]
    other = longer.model_copy(update={"identity": "cd" * 32})
    assert "it is another run, cdcdcdcdcdcdcdcd instead of abababababababab" in compare_weights(run, other)[1]


def test_compare_environment_lists_other_versions(release: Path):
    assert compare_environment(read_release(str(release))) == []
    change(release, "lineage.json", environment={"torch": "1.0", "python": "2.7", "nothing": "3"})
    torch, python, nothing = compare_environment(read_release(str(release)))
    assert torch.endswith("here, 1.0 in the release")
    assert python.startswith("python 3.")
    assert nothing == "nothing is not installed here, 3 in the release"


def test_command_trains_only_with_the_same_inputs(reproduced, monkeypatch, capsys):
    release, values, data = reproduced
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        reproduce, "materialize", lambda selection, **process: calls.append((selection, process)) or 0
    )
    command = ["reproduce", str(release), "--project", "again", "--data", f"shapes={data}"]
    assert main(command) == 0
    assert "Reproduced: the weights of step 3 have the released bytes" in capsys.readouterr().out
    assert [selection for selection, _ in calls] == [
        '+key:"again/base_model" or +key:"again/shapes_aspect_buckets"',
        '+key:"again/lora"',
    ]
    hardware = calls[1][1]["run_config"]["resources"]["hardware"]["config"]
    assert (hardware["device"], hardware["num_processes"]) == ("cpu", 1)

    calls.clear()
    SCAN.assign(key=["9", "9"]).to_parquet(values / "shapes_dataset.parquet")
    assert main(command) == 1
    output = capsys.readouterr().out
    assert "dataset shapes: images or captions differ" in output
    assert "Add --train-anyway" in output
    assert len(calls) == 1
    assert main([*command, "--train-anyway"]) == 0
    assert len(calls) == 3

    (values / "lora.json").write_text(trained(values, steps=4).model_dump_json())
    assert main([*command, "--train-anyway"]) == 1
    assert "Not reproduced: the release is step 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--project", "again"], "nowhere is neither a folder nor a Hub id"),
        (["{release}", "--project", "a/b"], "--project a/b is not the name of a folder"),
        (["{release}", "--project", "again", "--data", "shapes"], "--data shapes has no name and value"),
        (["{release}", "--project", ""], "--project  is not the name of a folder"),
        (["{release}", "--project", "again"], "the release does not contain the images of shapes"),
    ],
)
def test_command_errors_are_one_sentence_and_status_two(
    release: Path, monkeypatch, tmp_path: Path, capsys, arguments: list[str], message: str
):
    monkeypatch.setenv(PROJECTS_VARIABLE, str(tmp_path / "elsewhere"))
    assert main(["reproduce", *(argument.format(release=release) for argument in arguments)]) == 2
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(message)
    assert not (tmp_path / "elsewhere").exists()


def test_command_of_the_card_needs_no_more_than_the_images(
    release: Path, monkeypatch, tmp_path: Path, capsys
):
    monkeypatch.setenv(PROJECTS_VARIABLE, str(tmp_path / "projects"))
    monkeypatch.setattr(reproduce, "materialize", lambda *_, **__: 1)
    lineage = json.loads((release / "lineage.json").read_text())
    assert datasets_without_location(lineage) == ["shapes"]
    main(["reproduce", str(release), "--data", f"shapes={tmp_path}"])
    folder = tmp_path / "projects" / "small_reproduced"
    assert capsys.readouterr().out.startswith(f"Project small_reproduced is in {folder}.")
    assert load_project(folder).datasets[0].instance_data_dir == tmp_path


@pytest.mark.slow
def test_reduced_demo_is_reproduced_to_the_same_bytes(
    tmp_path: Path, monkeypatch, instance, capfd, one_thread
):
    source = tmp_path / "projects" / "demo"
    source.mkdir(parents=True)
    for path in (REPOSITORY / "projects" / "demo").glob("*.json"):
        shutil.copy(path, source)
    config = json.loads((source / "config.json").read_text())
    config |= {
        "max_train_steps": 3,
        "lr_warmup_steps": 1,
        "train_batch_size": 2,
        "validation_num_inference_steps": 1,
    }
    (source / "config.json").write_text(json.dumps(config))
    request = {"generator": "zorp", "images": 5, "eval_images": 2, "prior_images": 3, "seed": 7}
    (source / "generate_data.json").write_text(json.dumps(request))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = materialize(instance, source)
    assert result.success
    project = load_project(source)
    values = Path(result.asset_materializations_for_node("demo__lora")[0].metadata["path"].value).parent
    lora = TrainedLora.model_validate_json((values / "lora.json").read_bytes())
    training_set = json.loads((values / "training_set.json").read_text())
    spec = TrainSpec.model_validate_json((Path(lora.run_dir) / "spec.json").read_bytes())
    lineage = release_lineage(project, spec.base_model, training_set["data_versions"], lora, spec)
    release = tmp_path / "release"
    release.mkdir()
    (release / "lineage.json").write_text(json.dumps(portable_lineage(lineage)))
    (release / "training_config.json").write_text(json.dumps(portable_settings(spec.settings)))

    monkeypatch.setenv(PROJECTS_VARIABLE, str(source.parent))
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(REPOSITORY / "dagster.yaml", home)
    monkeypatch.setattr(dagster_command, "REPOSITORY", home)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    assert main(["reproduce", str(release), "--project", "again"]) == 0
    assert (
        f"Reproduced: the weights of step 3 have the released bytes: SHA-256 {lora.weights_sha256}"
        in capfd.readouterr().out
    )
    assert list((source.parent / "again" / "output" / "lora").iterdir())

    image = source.parent / "again" / "data" / "zorp" / "00.txt"
    image.write_text("another caption\n")
    assert main(["reproduce", str(release), "--project", "again"]) == 1
    assert "dataset zorp: images or captions differ" in capfd.readouterr().out
