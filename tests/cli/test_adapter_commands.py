"""The commands merge, extract and resize: what they print, and errors as one sentence with exit status 2."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdxl_pipeline.cli.main import main
from sdxl_pipeline.cli.merge import parse_adapter
from sdxl_pipeline.models.base_model import BUNDLED_MODEL, BUNDLED_NAME
from sdxl_pipeline.release.adapter_sources import layer_names, resolve_named_model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a LoRA of rank 4 of two layers, with kohya's names."""
    layers = [
        layer for layer in layer_names(resolve_named_model(BUNDLED_NAME)).layers if layer.model == "unet"
    ][5:7]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in layers:
        tensors[f"{layer.kohya}.lora_down.weight"] = torch.randn(4, *layer.shape[1:], generator=generator)
        ones = (1,) * len(layer.shape[2:])
        tensors[f"{layer.kohya}.lora_up.weight"] = (
            torch.randn(layer.shape[0], 4, *ones, generator=generator) / 100
        )
        tensors[f"{layer.kohya}.alpha"] = torch.tensor(4.0)
    path = tmp_path_factory.mktemp("adapter") / "zorp.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_merge_resize_and_extract_round_trip(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    merged, base = str(tmp_path / "merged"), ["--base", BUNDLED_NAME]
    assert main(["merge", f"{adapter}:0.5", "--into", BUNDLED_NAME, "--output", merged]) == 0
    assert capsys.readouterr().out.strip() == f"{merged}: 2 layers of {BUNDLED_NAME} changed"
    extracted = tmp_path / "extracted.safetensors"
    assert main(["extract", merged, *base, "--rank", "4", "--output", str(extracted)]) == 0
    assert f"{extracted}: 2 layers, rank 4, relative error 0.0" in capsys.readouterr().out
    doubled = tmp_path / "doubled.safetensors"
    assert main(["merge", f"{extracted}:2", f"{adapter}:1", *base, "--output", str(doubled)]) == 0
    assert f"{doubled}: 2 layers, rank 8, relative error 0.0" in capsys.readouterr().out
    resized = tmp_path / "resized.safetensors"
    assert main(["resize", str(adapter), *base, "--rank", "2", "--layers", "--output", str(resized)]) == 0
    output = capsys.readouterr().out
    assert f"{resized}: 2 layers, rank 2, relative error 0." in output
    assert output.count("unet.") == 2


def test_errors_are_one_sentence_and_status_two(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = ["--output", str(tmp_path / "out.safetensors")]
    for command, message in (
        (["merge", str(adapter), *output], "one adapter alone is already a LoRA file"),
        (
            ["merge", f"{adapter}:much", "--into", BUNDLED_NAME, *output],
            "the scale 'much' is not a finite number; write",
        ),
        # rich replaces ":x:" by an emoji unless that is switched off
        (["merge", f"{adapter}:x", "--into", BUNDLED_NAME, *output], f"{adapter}:x: the scale 'x'"),
        (["merge", f"{adapter}:nan", str(adapter), *output], "the scale 'nan' is not a finite number"),
        (
            ["merge", str(adapter), "--into", BUNDLED_NAME, "--rank", "4", *output],
            "remove them, or remove --into",
        ),
        (["merge", str(adapter), "--into", "nowhere", *output], "'nowhere' is neither a file nor a folder"),
        (
            ["resize", str(adapter), "--rank", "2", *output],
            "but the layer's weight has (320, 1280); check the file, or name its base model with --base or --into",
        ),
        (["resize", "a.ckpt", "--base", BUNDLED_NAME, "--rank", "2", *output], "is not a .safetensors file"),
        (
            ["resize", str(adapter), "--base", BUNDLED_NAME, "--rank", "2", "--output", str(adapter)],
            "is not overwritten",
        ),
        (
            ["resize", str(adapter), "--base", BUNDLED_NAME, "--rank", "2", "--output", "a.ckpt"],
            "the only format written",
        ),
        (
            ["extract", str(BUNDLED_MODEL), "--base", BUNDLED_NAME, "--rank", "2", *output],
            "nothing to extract",
        ),
    ):
        assert main(command) == 2
        lines = capsys.readouterr().out.strip().splitlines()
        assert len(lines) == 1, lines
        assert message in lines[0]
    for command in (["--rank", "0"], ["--error", "1.5"], ["--rank", "two"]):
        with pytest.raises(SystemExit) as stopped:
            main(["resize", str(adapter), *command, *output])
        assert stopped.value.code == 2
    assert not list(tmp_path.iterdir())


def test_parse_adapter_reads_path_and_scale():
    for text, expected in (
        ("a.safetensors", (Path("a.safetensors"), 1.0)),
        ("a.safetensors:-0.5", (Path("a.safetensors"), -0.5)),
        (r"C:\\a.safetensors", (Path(r"C:\\a.safetensors"), 1.0)),
        (r"C:\\a.safetensors:2", (Path(r"C:\\a.safetensors"), 2.0)),
    ):
        assert parse_adapter(text) == expected
