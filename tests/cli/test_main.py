"""The command line: doctor, settings and prune."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdxl_pipeline.cli.main import main
from sdxl_pipeline.config.loader import PROJECTS_VARIABLE
from sdxl_pipeline.config.settings_page import settings_page


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def rows(output):
    return {line.split()[0]: line.split()[1:] for line in output.splitlines() if len(line.split()) > 1}


def test_doctor_valid_project_shows_each_value_and_its_source(make_project, capsys):
    folder = make_project(config={"disable_benchmark": True})
    assert main(["doctor", str(folder)]) == 0
    output = capsys.readouterr().out
    shown = rows(output)
    assert shown["lora_rank"] == ["4", "config.json"]
    assert shown["mixed_precision"] == ["no", "hardware", "profile", "cpu"]
    assert shown["seed"] == ["42", "default"]
    assert shown["shapes"][0] == "train"
    assert "disable_benchmark has no meaning here" in output
    assert max(len(line) for line in output.splitlines()) <= 100 or str(folder) in output


def test_doctor_set_only_omits_defaults(make_project, capsys):
    assert main(["doctor", "--set-only", str(make_project())]) == 0
    shown = rows(capsys.readouterr().out)
    assert "lora_rank" in shown
    assert "seed" not in shown


def test_doctor_invalid_project_prints_all_problems_and_returns_one(make_project, capsys, monkeypatch):
    good = make_project("good")
    make_project("bad", config={"learning_rat": 1})
    monkeypatch.setenv(PROJECTS_VARIABLE, str(good.parent))
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "learning_rat = 1\n    is not a known key\n    -> write learning_rate" in output
    assert rows(output)["lora_rank"] == ["4", "config.json"]  # the valid project is shown as well
    assert main(["doctor", "good"]) == 0


def test_doctor_missing_dataset_folder_is_reported(make_project, capsys):
    folder = make_project(dataset={"instance_data_dir": "elsewhere"})
    assert main(["doctor", str(folder)]) == 0
    assert f"{folder / 'elsewhere'} does not exist" in capsys.readouterr().out


def test_doctor_unused_settings_and_files_are_reported(make_project, capsys):
    dataset = {"caption_strategy": "filename", "crop": False, "crop_aspect": "square", "crop_style": "center"}
    folder = make_project(images=3, dataset=dataset)
    (folder / "data").rename(folder / "10_shapes")
    (folder / "data").mkdir()
    (folder / "10_shapes").rename(folder / "data" / "10_shapes")
    assert main(["doctor", str(folder)]) == 0
    output = capsys.readouterr().out
    assert '"shapes".crop_aspect has no effect: crop is false' in output
    assert "3 text files are stored beside images and not read; write caption_strategy: textfile." in output
    assert 'write "repeats": 9 in this entry.' in output


def test_doctor_unavailable_source_is_reported(make_project, capsys, monkeypatch):
    elsewhere = {"instance_data_dir": "", "type": "csv", "csv_file": "list.csv"}
    folder = make_project(dataset=elsewhere)
    assert main(["doctor", str(folder)]) == 0
    output = capsys.readouterr().out
    assert f"no list yet, {folder / 'list.csv'} does not exist" in output
    assert rows(output)["shapes"][:2] == ["train", "csv"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    elsewhere = {"instance_data_dir": "", "type": "aws", "url": "s3://bucket/cats"}
    assert main(["doctor", str(make_project("bucket", dataset=elsewhere))]) == 0
    assert "pip install 'sdxl-pipeline[s3]'" in capsys.readouterr().out


def test_doctor_hardware_option_selects_an_existing_profile(make_project, capsys):
    folder = str(make_project())
    assert main(["doctor", "--hardware", "cuda-24gb", folder]) == 0
    assert rows(capsys.readouterr().out)["mixed_precision"] == ["bf16", "hardware", "profile", "cuda-24gb"]
    assert main(["doctor", "--hardware", "cuda-25gb", folder]) == 1
    assert "cuda-25gb" in capsys.readouterr().out


def test_doctor_settings_unsupported_by_the_hardware_return_one(make_project, capsys):
    assert main(["doctor", str(make_project(config={"mixed_precision": "fp16"}))]) == 1
    assert "fp16" in capsys.readouterr().out


def test_doctor_unknown_project_lists_the_known_ones(make_project, capsys, monkeypatch):
    monkeypatch.setenv(PROJECTS_VARIABLE, str(make_project("good").parent))
    assert main(["doctor", "goood"]) == 1
    assert "there are: good" in capsys.readouterr().out


def test_settings_prints_the_settings_page(capsys):
    assert main(["settings"]) == 0
    assert capsys.readouterr().out == settings_page()


def test_doctor_does_not_import_torch(make_project):
    code = "import sys; from sdxl_pipeline.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code, "doctor", str(make_project())],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert process.returncode == 0


def write_unreferenced_entries(storage):
    """Write two entries that no project refers to, and return their size in bytes."""
    from sdxl_pipeline.cache.store.tensor_store import TensorStore

    store = TensorStore(storage / "latents")
    with store.writer() as writer:
        for digit in "ab":
            writer.add(digit * 64, {"mean": torch.zeros(1000)})
    return sum(path.stat().st_size for path in (storage / "latents" / "shards").iterdir())


def test_prune_shows_entries_and_frees_them_with_yes(make_project, monkeypatch, capsys, isolated_storage):
    monkeypatch.setenv(PROJECTS_VARIABLE, str(make_project(images=0).parent))
    size = write_unreferenced_entries(isolated_storage)
    assert main(["prune", "--dry-run"]) == 0
    assert main(["prune"]) == 1, "the terminal is not interactive"
    output = capsys.readouterr().out
    assert "entries" in output
    assert f"{size / 1000:.1f} kB" in output
    assert "Add --yes" in output
    assert list((isolated_storage / "latents" / "shards").iterdir())
    assert main(["prune", "--yes"]) == 0
    assert f"Freed {size / 1000:.1f} kB" in capsys.readouterr().out
    assert not list((isolated_storage / "latents" / "shards").iterdir())
    assert main(["prune"]) == 0
    assert "Nothing to free" in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "freed"), [("y", True), ("n", False), ("", False)])
def test_prune_interactive_terminal_asks_for_confirmation(
    make_project, monkeypatch, capsys, isolated_storage, answer, freed
):
    monkeypatch.setenv(PROJECTS_VARIABLE, str(make_project(images=0).parent))
    write_unreferenced_entries(isolated_storage)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt="": answer)
    assert main(["prune"]) == (0 if freed else 1)
    assert (not list((isolated_storage / "latents" / "shards").iterdir())) == freed


def test_prune_without_projects_frees_nothing_and_prints_the_reason(
    monkeypatch, capsys, isolated_storage, tmp_path
):
    monkeypatch.setenv(PROJECTS_VARIABLE, str(tmp_path / "typo"))
    write_unreferenced_entries(isolated_storage)
    assert main(["prune", "--yes"]) == 1
    assert "Nothing is freed: the projects folder" in capsys.readouterr().out
    assert list((isolated_storage / "latents" / "shards").iterdir())


def test_main_interrupted_ends_with_a_sentence(monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("sdxl_pipeline.cli.settings.run", interrupt)
    assert main(["settings"]) == 130
    assert capsys.readouterr().out == "Interrupted.\n"
