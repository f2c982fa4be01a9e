"""The memory estimate agrees with torch's saved tensors, optimizer states, measured runs and known values of SDXL."""

import contextlib
import functools
import json

import psutil
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.adapters.adapter import add_adapter, add_lora
from sdxl_pipeline.models.base_model import BUNDLED_MODEL, SDXL_BASE_CONFIGS
from sdxl_pipeline.models.precision import quantize_model
from sdxl_pipeline.models.unet_execution import enable_checkpointing
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal
from sdxl_pipeline.stages.train import main
from sdxl_pipeline.training.memory import memory_estimate
from sdxl_pipeline.training.memory.activations import ForwardPass, activations, saved_by_adapters
from sdxl_pipeline.training.memory.memory_estimate import (
    MemoryEstimate,
    estimate_memory,
    hints,
    optimizer_bytes,
)
from sdxl_pipeline.training.trainer_setup import trained_dtype
from tests.models.adapted_unets import lycoris
from tests.support.train_programs import RecordingReporter, run
from tests.support.training_datasets import make_dataset, make_spec

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = [*TARGETS, "net.0.proj", "net.2", "conv1", "conv2", "conv_shortcut", "proj_in", "conv"]
BLOCKS = {"target_module": ["Attention", "FeedForward", "ResnetBlock2D"]}
ADAPTERS = {
    "lora": {"lora_rank": 16},
    "lora everywhere": {"lora_rank": 16, "lora_target_modules": EVERYWHERE},
    "dora": {"lora_rank": 16, "use_dora": True},
    "dora everywhere": {"lora_rank": 16, "use_dora": True, "lora_target_modules": EVERYWHERE},
    "lokr, whole matrices": lycoris("lokr", linear_dim=10000, factor=12),
    "lokr everywhere": lycoris("lokr", factor=4, apply_preset=BLOCKS),
    "lokr, weights rebuilt": lycoris("lokr", factor=8, bypass_mode=False),
    "loha everywhere": lycoris("loha", apply_preset=BLOCKS),
}


def settings_of(**values) -> TrainingSettings:
    return TrainingSettings(
        **{
            "max_train_steps": 6,
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "train_batch_size": 1,
            **values,
        }
    )


def unet_of(folder, dtype: torch.dtype, kind: str = "lora") -> UNet2DConditionModel:
    """Return a UNet with an adapter, or for full fine-tuning; SDXL's has fake tensors."""
    if folder == BUNDLED_MODEL:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
    else:
        unet = on_meta(folder, dtype)
    if kind != "full":
        add_adapter(unet, TrainingSettings.model_validate(ADAPTERS[kind]), seed=0)
    return unet.train() if folder == BUNDLED_MODEL else with_fake_tensors(unet.train())


def on_meta(folder, dtype: torch.dtype) -> UNet2DConditionModel:
    config = json.loads((folder / "unet" / "config.json").read_text())
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
    finally:
        torch.set_default_dtype(before)


def with_fake_tensors(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Replace all tensors by fake ones: torch runs the model without computing anything."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        for module in unet.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    module._parameters[name] = torch.nn.Parameter(empty, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return unet


def saved_by_torch(unet: UNet2DConditionModel, forward_pass: ForwardPass) -> int:
    """Return the bytes that autograd saves for one forward pass, without parameters and buffers."""
    if forward_pass.checkpointing:
        enable_checkpointing(unet, forward_pass.interval)
    like, config, saved = next(unet.parameters()), unet.config, {}
    own = {tensor.untyped_storage()._cdata for tensor in (*unet.parameters(), *unet.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved.setdefault(storage._cdata, (storage.nbytes(), storage))
        return tensor

    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    batch = forward_pass.batch_size
    conditioning = {
        "text_embeds": like.new_zeros(batch, pooled),
        "time_ids": like.new_zeros(batch, 6).float(),
    }
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward_pass.dtype == torch.bfloat16),
    ):
        unet(
            like.new_zeros(batch, 4, forward_pass.height // 8, forward_pass.width // 8),
            like.new_zeros(batch, dtype=torch.long),
            like.new_zeros(batch, 77, config.cross_attention_dim),
            added_cond_kwargs=conditioning,
        )
    return sum(size for storage, (size, _) in saved.items() if storage not in own)


CHECKPOINTING = {"": (False, 1), " checkpointed": (True, 1), " every second": (True, 2)}


def case(kind: str, precision: str, checkpointing: str = "", slow: bool = False):
    """Return a test case; cases that add little to the others are slow."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    marks = [pytest.mark.slow] if slow else []
    values = (kind, dtype, *CHECKPOINTING[checkpointing])
    return pytest.param(*values, id=f"{kind} {precision}{checkpointing}", marks=marks)


CASES = [
    case("lora", "fp32"),
    case("lora", "bf16"),
    case("lora", "bf16", " checkpointed"),
    case("lora", "bf16", " every second"),
    case("full", "fp32", " checkpointed"),
    case("lora everywhere", "bf16"),
    case("lora everywhere", "fp32", " checkpointed", slow=True),
    case("dora", "bf16"),
    case("dora everywhere", "fp32"),
    case("dora everywhere", "fp32", " every second", slow=True),
    case("lokr, whole matrices", "bf16"),
    case("lokr, whole matrices", "fp32", " every second", slow=True),
    case("lokr everywhere", "bf16"),
    case("lokr, weights rebuilt", "bf16"),
    case("loha everywhere", "bf16"),
    case("loha everywhere", "fp32", " checkpointed", slow=True),
]


def compare(folder, edge: int, kind: str, dtype, checkpointing: bool, interval: int) -> tuple[float, int]:
    """Return the estimated and the actual bytes of saved activations."""
    unet = unet_of(folder, dtype, kind)
    forward_pass = ForwardPass(edge, edge, 2, dtype, kind == "full", checkpointing, interval)
    # intermediate tensors such as DoRA's identity matrices must be fake as well
    with getattr(next(unet.parameters()), "fake_mode", contextlib.nullcontext()):
        adapters = {} if forward_pass.full else saved_by_adapters(unet, dtype)
        return activations(unet, forward_pass, adapters).saved, saved_by_torch(unet, forward_pass)


@pytest.mark.parametrize(("kind", "dtype", "checkpointing", "interval"), CASES)
def test_activations_of_bundled_unet_match_torch(kind, dtype, checkpointing, interval):
    estimated, actual = compare(BUNDLED_MODEL, 128, kind, dtype, checkpointing, interval)
    assert estimated == pytest.approx(actual, rel=0.12)


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        ("lora", False),
        ("lora", True),
        ("dora", False),
        pytest.param("dora", True, marks=pytest.mark.slow),
        ("lokr everywhere", False),
        pytest.param("lokr everywhere", True, marks=pytest.mark.slow),
        ("full", False),
        ("full", True),
    ],
)
def test_activations_with_float32_norms_match_torch(kind, checkpointing, monkeypatch):
    """Autocast computes norms in float32 on CUDA but not on a CPU."""
    functional = torch.nn.functional

    def in_float32(norm):
        def compute(inputs, shape, weight, bias, eps):
            return norm(inputs.float(), shape, weight.float(), bias.float(), eps)

        return compute

    monkeypatch.setattr(functional, "group_norm", in_float32(functional.group_norm))
    monkeypatch.setattr(functional, "layer_norm", in_float32(functional.layer_norm))
    unet = unet_of(BUNDLED_MODEL, torch.bfloat16, kind)
    forward_pass = ForwardPass(
        128, 128, 2, torch.bfloat16, kind == "full", checkpointing, norms_in_float32=True
    )
    adapters = {} if forward_pass.full else saved_by_adapters(unet, torch.bfloat16)
    assert activations(unet, forward_pass, adapters).saved == pytest.approx(
        saved_by_torch(unet, forward_pass), rel=0.12
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "checkpointing", "interval"), CASES)
def test_activations_of_sdxl_unet_match_torch(kind, dtype, checkpointing, interval):
    estimated, actual = compare(SDXL_BASE_CONFIGS, 1024, kind, dtype, checkpointing, interval)
    assert estimated == pytest.approx(actual, rel=0.12)


@pytest.mark.parametrize("precision", ["int8-quanto", "int8-torchao", "nf4-bnb"])
def test_estimate_memory_quantized_layers_match_torch(precision):
    unet = UNet2DConditionModel.from_pretrained(BUNDLED_MODEL / "unet").requires_grad_(False)
    quantize_model(unet, precision)
    add_lora(unet.train(), 16, 16.0, 0.0, TARGETS, seed=0)
    own = {address for weight in unet.parameters() for address, _ in storages(weight)}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.update({address: storage for address, storage in storages(tensor) if address not in own})
        return tensor

    inputs = {"text_embeds": torch.zeros(2, 64), "time_ids": torch.zeros(2, 6)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unet(
            torch.zeros(2, 4, 16, 16),
            torch.zeros(2, dtype=torch.long),
            torch.zeros(2, 77, 128),
            added_cond_kwargs=inputs,
        )
    settings = settings_of(
        base_model_precision=precision, mixed_precision="no", gradient_checkpointing=False, train_batch_size=2
    )
    estimate = estimate_memory(settings, unet, unet, [(128, 128)])
    forward_pass = ForwardPass(128, 128, 2, torch.float32, False, False)
    peak = activations(unet, forward_pass, saved_by_adapters(unet, torch.float32)).peak
    actual = sum(storage.nbytes() for storage in saved.values())
    assert estimate.activations - peak == pytest.approx(actual, rel=0.15)


def storages(tensor: torch.Tensor):
    """Yield the storages of a tensor, or of its parts if it is quantized."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages(getattr(tensor, name))
    else:
        storage = tensor.untyped_storage()
        yield storage._cdata, storage


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw", 8),
        ("adamw_bf16", 6),
        ("optimi-lion", 4),
        ("optimi-sgd", 0),
        ("optimi-adan", 16),
        ("ao-adamw8bit", 2),
        ("ao-adamw4bit", 1),
        ("bnb-adamw", 8),
        ("bnb-adamw8bit-paged", 2),
        ("prodigy", 16),
        ("adafactor", 0),
        ("adamw_schedulefree", 8),
    ],
)
def test_optimizer_bytes_per_parameter(name, expected):
    state = torch.random.get_rng_state()
    settings = settings_of(optimizer=name)
    assert optimizer_bytes(settings, trained_dtype(settings)) == pytest.approx(expected, abs=0.1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_estimate_memory_sdxl_base_matches_known_values():
    """SDXL has 2 567 463 684 parameters, a rank-16 LoRA of the attention 23.2 million more. At 1024 pixels with batch 1, bf16 and
    checkpointing it trains within 8 GB, without checkpointing not within 10; full AdamW fine-tuning in float32 takes 4 x 10.3 GB."""
    unet = unet_of(SDXL_BASE_CONFIGS, torch.bfloat16)
    frozen = [parameter for parameter in unet.parameters() if not parameter.requires_grad]
    assert sum(parameter.numel() for parameter in frozen) == 2_567_463_684
    settings = settings_of()
    checkpointed = estimate_memory(settings, unet, unet, [(1024, 1024), (832, 1216)])
    assert checkpointed.frozen_weights == 2 * 2_567_463_684
    assert checkpointed.trained_weights == checkpointed.gradients == 4 * 23_224_320
    assert checkpointed.optimizer == pytest.approx(2 * checkpointed.trained_weights, rel=0.01)
    assert 5.5e9 < checkpointed.total < 8e9
    unchecked = estimate_memory(settings_of(gradient_checkpointing=False), unet, unet, [(1024, 1024)])
    assert 10e9 < unchecked.total < 16e9
    full = settings_of(model_type="full", optimizer="adamw")
    full_unet = unet_of(SDXL_BASE_CONFIGS, torch.float32, "full")
    assert estimate_memory(full, full_unet, full_unet, [(1024, 1024)]).total == pytest.approx(
        4 * 10.27e9, rel=0.1
    )


def test_memory_estimate_total_uses_larger_of_step_and_image():
    common = {"process": 1, "frozen_weights": 10, "trained_weights": 2, "optimizer": 4, "average": 2}
    assert MemoryEstimate(**common, gradients=2, activations=5, image=3).total == 26
    assert MemoryEstimate(**common, gradients=2, activations=5, image=30).total == 49


def test_hints_list_only_settings_not_yet_used():
    estimate = MemoryEstimate(0, 10, 1, 2, 0, 1, 20, 0)
    light = settings_of(base_model_precision="int8-quanto")
    assert hints(light, estimate) == []
    heavy = settings_of(gradient_checkpointing=False, train_batch_size=4, mixed_precision="no")
    assert hints(heavy, estimate) == [
        "gradient_checkpointing true",
        "a smaller train_batch_size, and more gradient_accumulation_steps for it",
        "mixed_precision bf16",
        "base_model_precision int8-quanto",
    ]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


def test_train_logs_memory_estimate_and_warns_of_small_device(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_estimate, "device_bytes", lambda device: 2**20)
    reporter = RecordingReporter()
    manifest = main(make_spec(tmp_path, dataset, max_train_steps=2), reporter, StopSignal())
    estimate_line = next(line for line in reporter.lines if line.startswith("Memory:"))
    assert "activations" in estimate_line
    warning = next(line for line in reporter.lines if line.startswith("Warning: the device has"))
    assert "gradient_checkpointing true" in warning
    parts = manifest.memory_estimate
    assert parts["frozen weights"] == 4 * 5_348_996
    assert manifest.estimated_memory_bytes < sum(parts.values()) + 1
    # the process may have run other tests as well
    assert manifest.peak_memory_bytes > psutil.Process().memory_info().rss / 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr, whole matrices"])
def test_train_in_child_process_peak_memory_matches_estimate(kind, dataset, tmp_path):
    with_images = {"validation_disable": False, "validation_step_interval": 1}
    spec = make_spec(tmp_path, dataset, max_train_steps=2, **with_images, **ADAPTERS[kind])
    # Linux counts the peak memory of the parent process, here pytest, as the child's own
    manifest = run(spec, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
    assert manifest.estimated_memory_bytes == pytest.approx(manifest.peak_memory_bytes, rel=0.05)


class StopAtFirstCheckpoint(StopSignal):
    """Requests a stop once the run's folder contains a checkpoint."""

    def __init__(self, folder) -> None:
        super().__init__()
        self.folder = folder

    @property
    def requested(self) -> bool:
        return any((self.folder / "checkpoints").glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "package"),
    [
        ("int8-torchao", "torchao"),
        pytest.param("int8-quanto", "optimum.quanto", marks=pytest.mark.slow),
        pytest.param("nf4-bnb", "bitsandbytes", marks=pytest.mark.slow),
    ],
)
def test_train_quantized_stopped_and_resumed_has_same_weights(precision, package, dataset, tmp_path):
    pytest.importorskip(package, reason="needs the extra `quantization`")
    settings = {"max_train_steps": 4, "checkpoint_step_interval": 2, "base_model_precision": precision}
    unbroken = main(make_spec(tmp_path, dataset, run="unbroken", **settings), Reporter(), StopSignal())
    spec = make_spec(tmp_path, dataset, run="stopped", **settings)
    with pytest.raises(StageStopped):
        main(spec, Reporter(), StopAtFirstCheckpoint(tmp_path / "stopped"))
    resumed = main(spec, Reporter(), StopSignal())
    assert resumed.resumed_from_step == 2
    assert resumed.weights_sha256 == unbroken.weights_sha256


@pytest.mark.slow
def test_train_with_complete_caches_loads_vae_only_for_images(dataset, tmp_path, monkeypatch):
    constructed = []
    for kind in (CLIPTextModel, CLIPTextModelWithProjection, AutoencoderKL):

        @functools.wraps(kind.__init__)
        def counted(self, *arguments, kind=kind, init=kind.__init__, **named):
            if not torch.empty(0).is_meta:  # an architecture without weights takes no memory
                constructed.append(kind)
            init(self, *arguments, **named)

        monkeypatch.setattr(kind, "__init__", counted)
    main(make_spec(tmp_path, dataset, run="without_images", max_train_steps=1), Reporter(), StopSignal())
    assert constructed == []
    with_images = {"validation_disable": False, "validation_step_interval": 0}
    main(
        make_spec(tmp_path, dataset, run="with_images", max_train_steps=1, **with_images),
        Reporter(),
        StopSignal(),
    )
    assert set(constructed) == {AutoencoderKL}
