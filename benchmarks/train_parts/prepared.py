"""A run with complete caches: photographs, latents, embeddings and the spec of a training, made by the stages' own code."""

from pathlib import Path

from benchmarks.photographs import write_dataset
from sdxl_pipeline.config.hardware_profiles import PRESETS, Hardware
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.data.buckets.crop_plan import plan_crops
from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from sdxl_pipeline.models.base_model import BUNDLED_NAME, ResolvedModel, resolve_base_model
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EncodeLatentsSpec, EncodeTextSpec, TrainingDataset, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.stages import encode_latents, encode_text

HARDWARE = PRESETS["cpu"].model_copy(update={"cpu_threads": 1})
IMAGES = 64
BATCH_SIZE = 4
RANK = 16


def prepared_run(root: Path, steps: int, resolution: int, images: int = IMAGES) -> TrainSpec:
    """Return the spec of a run of `steps` steps on square crops of `resolution` pixels with complete caches, before its first step."""
    model = resolve_base_model(TrainingSettings(pretrained_model_name_or_path=BUNDLED_NAME), root)
    settings = TrainingSettings(
        pretrained_model_name_or_path=BUNDLED_NAME,
        train_batch_size=BATCH_SIZE,
        max_train_steps=steps,
        lora_rank=RANK,
        learning_rate=1e-4,
        mixed_precision=HARDWARE.mixed_precision,
        gradient_checkpointing=False,
        base_model_precision="no_change",
        checkpoint_step_interval=0,
        validation_disable=True,
    )
    return TrainSpec(
        base_model=model,
        hardware=HARDWARE,
        settings=settings,
        datasets=(_dataset(root, model, HARDWARE, resolution, images),),
        prompts=(),
        run_dir=str(root / "run"),
        project="benchmark",
    )


def _dataset(
    root: Path, model: ResolvedModel, hardware: Hardware, resolution: int, images: int
) -> TrainingDataset:
    data = root / "data"
    write_dataset(data, images)
    dataset = ImageDataset.model_validate(
        {
            "id": "photos",
            "instance_data_dir": str(data),
            "caption_strategy": "textfile",
            "resolution": resolution,
            "resolution_type": "pixel_area",
            "crop": True,
            "crop_aspect": "square",
        }
    )
    scanned = scan_dataset(dataset, data)
    rows, _ = plan_crops(dataset, scanned, seed=0, held_out=(), is_eval=False)
    rows.to_parquet(root / "rows.parquet")
    captions = scanned[["path", "key", "captions"]].explode("captions")
    captions.rename(columns={"captions": "caption"}).astype("str").to_parquet(root / "captions.parquet")
    latents = encode_latents.main(
        EncodeLatentsSpec(
            base_model=model,
            hardware=hardware,
            data_dir=str(data),
            rows_path=str(root / "rows.parquet"),
            store_root=str(root / "latents"),
            entries_path=str(root / "latents.parquet"),
            sample_path=str(root / "sample.png"),
        ),
        Reporter(),
        StopSignal(),
    )
    texts = encode_text.main(
        EncodeTextSpec(
            base_model=model,
            hardware=hardware,
            captions_path=str(root / "captions.parquet"),
            extra_prompts=(),
            store_root=str(root / "texts"),
            entries_path=str(root / "texts.parquet"),
            prompts_path=str(root / "prompts.parquet"),
        ),
        Reporter(),
        StopSignal(),
    )
    assert latents is not None
    assert texts is not None
    return TrainingDataset(
        dataset_id=dataset.id,
        data_dir=str(data),
        rows_path=str(root / "rows.parquet"),
        latents=latents,
        text_embeds=texts,
    )
