"""`sdxl-pipeline generate`: images of a project's run, of its checkpoints and of its files, at several strengths."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_pipeline.cli.main import main
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.adapters.adapter import add_adapter, save_adapter
from sdxl_pipeline.models.base_model import resolve_base_model
from sdxl_pipeline.models.components import load_unet
from sdxl_pipeline.runtime.evaluation_report import EvaluateSpec, EvaluationReport, Selection
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import TrainedLora
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.stages.evaluate import main as evaluate
from sdxl_pipeline.stages.train import main as train
from tests.conftest import write_project
from tests.support.finished_run import write_finished_run
from tests.support.training_datasets import NEGATIVE, PROMPT, make_spec, model_folder

pytestmark = pytest.mark.usefixtures("one_thread")

SEED = 7


class Trained(NamedTuple):
    """A project with a run of three steps, whose text encoders were trained, and its evaluation."""

    project: Path
    lora: TrainedLora
    report: EvaluationReport

    def image(self, step: int) -> np.ndarray:
        """Return the evaluation's image of the base model (step 0) or of the LoRA."""
        return pixels(next(image.path for image in self.report.images if image.step == step))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    root = tmp_path_factory.mktemp("generate")
    project = write_project(root, images=1, config={"pretrained_model_name_or_path": str(model_folder())})
    spec = make_spec(
        root,
        run="projects/small/output/lora/run",
        max_train_steps=3,
        checkpoint_step_interval=2,
        learning_rate=0.05,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        train_text_encoder=True,
        validation_negative_prompt=NEGATIVE,
        validation_seed=SEED,
        eval_loss_disable=True,
        evaluation_type="none",
        num_caption_samples=0,
        num_probe_images=0,
    )
    lora = train(spec, Reporter(), StopSignal())
    (Path(lora.run_dir) / "spec.json").write_text(spec.model_dump_json())  # as the asset does
    evaluation = EvaluateSpec(
        base_model=spec.base_model,
        hardware=spec.hardware,
        settings=spec.settings,
        lora=lora,
        datasets=spec.datasets,
        prompts=spec.prompts,
        output_dir=str(project / "output" / "evaluation"),
    )
    return Trained(project, lora, evaluate(evaluation, Reporter(), StopSignal()))


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def generate(out: Path, *arguments: str | Path) -> int:
    return main(["generate", *map(str, arguments), "--out", str(out), "--prompt", PROMPT])


def test_generate_scale_zero_is_base_and_one_is_evaluated_image(trained: Trained, tmp_path: Path, capsys):
    assert generate(tmp_path, "--project", trained.project, "--scale", "0,0.5,1", "--checkpoint", "last") == 0
    base, half, full = (
        pixels(tmp_path / f"a_red_circle_seed{SEED}_scale{scale}.png") for scale in ("0", "0.5", "1")
    )
    assert np.abs(trained.image(0) - trained.image(3)).mean() > 3
    assert np.abs(base - trained.image(0)).max() <= 1
    assert np.abs(full - trained.image(3)).max() <= 1
    assert min(np.abs(half - other).mean() for other in (base, full)) > 0.5
    sheet = pixels(tmp_path / "sheet.png")
    assert sheet.shape[1] > 3 * 256
    output = capsys.readouterr().out
    assert f"step 3 of the run {trained.lora.identity[:16]}" in output
    assert str(tmp_path / "sheet.png") in output


def test_generate_of_a_checkpoint_uses_its_weights(trained: Trained, tmp_path: Path):
    project = ("--project", trained.project, "--seed", "1,2")
    assert generate(tmp_path / "two", *project, "--checkpoint", "step-2") == 0
    names = [path.name for path in sorted((tmp_path / "two").glob("*.png"))]
    assert names == ["a_red_circle_seed1.png", "a_red_circle_seed2.png", "sheet.png"]
    assert generate(tmp_path / "last", *project[:2], "--seed", "1", "--checkpoint", "last") == 0
    at_two, last = (pixels(tmp_path / folder / names[0]) for folder in ("two", "last"))
    assert np.abs(at_two - last).mean() > 1


def test_generate_from_kohya_and_diffusers_files_is_the_same_image(trained: Trained, tmp_path: Path):
    assert trained.lora.kohya_path is not None
    paths = [shutil.copy(path, tmp_path) for path in (trained.lora.weights_path, trained.lora.kohya_path)]
    options = ("--model", model_folder(), "--size", "64x64", "--steps", "2", "--negative", NEGATIVE)
    for path in paths:
        out = tmp_path / Path(path).stem
        assert generate(out, "--file", path, "--seed", SEED, *options) == 0
        image = pixels(out / f"a_red_circle_seed{SEED}.png")
        # the kohya file is float16
        assert np.abs(image - trained.image(3)).mean() < 0.5


def test_generate_from_lycoris_file_unet_folder_and_model_folder(tmp_path: Path):
    settings = TrainingSettings.model_validate(
        {
            "pretrained_model_name_or_path": str(model_folder()),
            "lora_type": "lycoris",
            "lycoris_config": {"algo": "lokr", "linear_dim": 4, "linear_alpha": 4},
        }
    )
    unet = load_unet(resolve_base_model(settings, tmp_path, cache_dir=tmp_path), torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in add_adapter(unet, settings, seed=1):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    file = tmp_path / "lokr.safetensors"
    save_adapter({"unet": unet}, file)
    options = ("--model", model_folder(), "--size", "64x64", "--steps", "2", "--seed", "3")
    assert generate(tmp_path / "lokr", "--file", file, "--scale", "0,1", *options) == 0
    assert generate(tmp_path / "unet", "--file", model_folder() / "unet", *options) == 0
    assert generate(tmp_path / "model", "--file", model_folder(), *options[2:]) == 0
    base, full = (pixels(tmp_path / "lokr" / f"a_red_circle_seed3_scale{scale}.png") for scale in (0, 1))
    for folder in ("unet", "model"):
        assert np.array_equal(base, pixels(tmp_path / folder / "a_red_circle_seed3.png"))
    assert np.abs(base - full).mean() > 1


def test_generate_uses_the_checkpoint_that_the_evaluation_selected(trained: Trained, tmp_path: Path, capsys):
    checkpoint = Path(trained.lora.run_dir) / "checkpoints" / "step-00000002"
    digests = json.loads((checkpoint / "state.json").read_text())["sha256"]
    selected = Selection(requested="best", step=2, weights="trained", best_step=2, text="Step 2.")
    report = trained.report.model_copy(
        update={
            "run_identity": trained.lora.identity,
            "selected": selected,
            "lora_sha256": digests["pytorch_lora_weights.safetensors"],
        }
    )
    path = trained.project / "output" / "evaluation" / "newer" / "report.finished.json"
    path.parent.mkdir()
    path.write_text(report.model_dump_json())
    try:
        assert generate(tmp_path, "--project", trained.project, "--steps", "1") == 0
    finally:
        path.unlink()
    assert "step 2 of the run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--project", "nobody"], "neither a project folder nor the name of a project"),
        (["--project", "PROJECT"], "has no finished run; materialize its lora"),
        (["--project", "PROJECT", "--model", "x"], "remove --model"),
        (["--file", "absent.safetensors"], "absent.safetensors does not exist"),
        (["--file", "PROJECT/config.json"], "is not a .safetensors file"),
        (["--file", "MODEL/unet/diffusion_pytorch_model.safetensors"], "contains no LoRA or LyCORIS adapter of SDXL"),
        (["--file", "MODEL/unet", "--checkpoint", "last"], "remove --checkpoint"),
        (["--file", "MODEL/unet", "--model", "MODEL", "--scale", "0.5"], "these weights are a full UNet; remove --scale"),
        (["--file", "MODEL/unet", "--model", "MODEL", "--size", "65x64"], "--size 65x64"),
        (["--file", "MODEL/unet", "--model", "/absent"], "--model"),
        (["--file", "PROJECT"], "is the folder of neither a UNet nor a complete model"),
        (["--file", "MODEL", "--model", "MODEL"], "is a complete model; remove --model"),
    ],
)  # fmt: skip
def test_generate_mistake_is_one_sentence_and_exit_code_two(
    tmp_path: Path, make_project, monkeypatch, capsys, arguments, message
):
    project = make_project()
    monkeypatch.setenv("SDXL_PIPELINE_PROJECTS", str(project.parent))
    places = {"PROJECT": str(project), "MODEL": str(model_folder())}
    written = []
    for argument in arguments:
        for name, value in places.items():
            argument = argument.replace(name, value)
        written.append(argument)
    assert generate(tmp_path / "out", *written) == 2
    output = capsys.readouterr().out
    assert message in output
    assert "Traceback" not in output


def test_generate_unknown_checkpoint_lists_those_that_exist(make_project, tmp_path: Path, capsys):
    project = make_project()
    write_finished_run(project / "output" / "lora" / "run")
    spec = make_spec(tmp_path / "spec", run="run", pretrained_model_name_or_path="bundled:tiny-sdxl")
    (project / "output" / "lora" / "run" / "spec.json").write_text(spec.model_dump_json())
    assert generate(tmp_path / "out", "--project", project, "--checkpoint", "step-5") == 2
    assert "write selected, last or one of: step-12" in capsys.readouterr().out
    assert generate(tmp_path / "out", "--project", project, "--checkpoint", "selected") == 2
    assert "no evaluation has selected a checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", ["--scale=a", "--seed=1.5", "--seed=18446744073709551616", "--seed=-9223372036854775809"]
)
def test_generate_value_that_is_no_number_exits_with_two(tmp_path: Path, option):
    with pytest.raises(SystemExit) as exit_info:
        generate(tmp_path, "--project", "x", option)
    assert exit_info.value.code == 2
