"""Training of the text encoders: an adapter on each, and captions encoded at every step with gradients.

The text cache is not read, because its embeddings are out of date after one step. Tokens, windows and embeddings come from the same code
that fills the cache.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from sdxl_pipeline.config.schema.adapter import AdapterSettings
from sdxl_pipeline.models.adapters.adapter import AdapterError, add_lora
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import TextEncoders, load_text_encoders
from sdxl_pipeline.models.conditioning import PromptTokenizer, embed_tokens, encode_tokens
from sdxl_pipeline.runtime.specs import TrainingDataset
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.rng import derive_seed

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The layers of a text encoder that get an adapter, as in diffusers' training scripts."""


def trainable_text_encoders(
    base_model: ResolvedModel,
    dtype: torch.dtype,
    settings: AdapterSettings,
    seed: int,
    *,
    checkpointing: bool,
) -> TextEncoders:
    """Return both text encoders on the CPU in `dtype`, each with a new LoRA in float32; only the LoRAs require gradients.

    The last layer of the first encoder has no LoRA: SDXL uses the output of the layer before it, so it would get no gradient. Raise
    UserError for LoRA settings that the encoders do not support. `seed` is that of the run, `checkpointing` is gradient checkpointing.
    """
    encoders = load_text_encoders(base_model, dtype)
    for name, encoder in named_encoders(encoders).items():
        layers: int = encoder.config.num_hidden_layers
        try:
            add_lora(
                encoder,
                rank=settings.lora_rank,
                alpha=settings.effective_lora_alpha,
                dropout=settings.lora_dropout,
                target_modules=[
                    f"layers.{layer}.self_attn.{projection}"
                    for layer in range(layers if name == "text_encoder_2" else layers - 1)
                    for projection in ATTENTION_PROJECTIONS
                ],
                seed=derive_seed(seed, "adapter", name),
                use_dora=settings.use_dora,
                init=settings.lora_init_type,
            )
        except AdapterError as error:
            raise UserError(f"config.json: train_text_encoder: {error}") from error
        if checkpointing:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
    return encoders


def named_encoders(encoders: TextEncoders) -> dict[str, CLIPTextModel]:
    """Return both by their key prefixes in a LoRA file."""
    return {"text_encoder": encoders.text_encoder, "text_encoder_2": encoders.text_encoder_2}


def text_windows(datasets: Iterable[TrainingDataset]) -> int:
    """Return the number of 77-token windows of a caption, which the text stage gives all datasets alike."""
    return max(dataset.text_embeds.windows for dataset in datasets)


class UNetWithTextEncoders(nn.Module):
    """A UNet with its text encoders: called like a UNet, but with token ids in place of prompt embeddings.

    A single module, so that data parallelism covers all trained parameters in one forward pass.
    """

    def __init__(self, unet: UNet2DConditionModel, encoders: TextEncoders) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder, self.text_encoder_2 = encoders.text_encoder, encoders.text_encoder_2
        self._encoders = encoders

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor],
        return_dict: bool = True,
    ) -> Any:
        """Return the UNet's prediction (B, 4, H/8, W/8); `encoder_hidden_states` are token ids (B, 2, windows, 77)."""
        input_ids, input_ids_2 = encoder_hidden_states.unbind(1)
        prompt_embeds, pooled_prompt_embeds = embed_tokens(self._encoders, input_ids, input_ids_2)
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states=prompt_embeds.to(sample.dtype),
            added_cond_kwargs={"text_embeds": pooled_prompt_embeds.to(sample.dtype), **added_cond_kwargs},
            return_dict=return_dict,
        )


class OnlineTextEncoder:
    """Encodes captions and prompts with the current weights of the text encoders. Tokenization is thread-safe."""

    def __init__(self, encoders: TextEncoders, windows: int) -> None:
        self._encoders = encoders
        self._reader = PromptTokenizer(encoders, windows)
        self._tokenizer_lock = Lock()

    def input_ids(self, captions: Sequence[str]) -> Tensor:
        """Return token ids for both encoders, int64 (B, 2, windows, 77)."""
        with self._tokenizer_lock:
            return torch.stack(self._reader.to_windows(self._reader.read(captions)), dim=1)

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return `prompt_embeds` (B, 77 * windows, C1 + C2) and `pooled_prompt_embeds` (B, C2) on the CPU, without dropout and gradient."""
        with _eval_mode(*named_encoders(self._encoders).values()):
            embeds = encode_tokens(self._encoders, *self.input_ids(captions).unbind(1))
        return dict(
            zip(("prompt_embeds", "pooled_prompt_embeds"), (each.cpu() for each in embeds), strict=True)
        )


@contextmanager
def _eval_mode(*models: nn.Module) -> Iterator[None]:
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
