"""The tiny SDXL's components with their initial weights: SDXL's block types and interfaces, two orders of magnitude smaller.

Initialization matters as much as size: residual branches near zero and pyramids that already reproduce the
image let a model of this size converge in minutes (Zhang et al. 2019, "Fixup initialization").
"""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizerFast,
    CLIPVisionConfig,
)

# Latents times this factor have unit variance. Deliberately not SDXL's 0.13025: code must read it from the config.
SCALING_FACTOR = 0.25
TEXT_WIDTH = 64
CLIP_IMAGE_SIZE = 64
TIME_ID_WIDTH = 32
# SDXL's noise schedule (stabilityai/stable-diffusion-xl-base-1.0, scheduler_config.json).
NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def build_vae() -> AutoencoderKL:
    """Return an f8 autoencoder with 4 latent channels, initialized as a near-linear pyramid."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=128,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    )
    _init_as_pyramid(vae)
    return vae


def build_tiny_autoencoder() -> AutoencoderTiny:
    """Return the fast decoder for previews of the VAE's latents (Ollin Boer Bohan's TAESD), 16 channels wide."""
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16, 16),
        decoder_block_out_channels=(16, 16, 16, 16),
        num_encoder_blocks=(1, 1, 1, 3),
        num_decoder_blocks=(3, 1, 1, 1),
        latent_channels=4,
        scaling_factor=1.0,  # it maps to latents which are already scaled, as TAESD does
        force_upcast=False,
    )


def build_clip(tokenizer: CLIPTokenizerFast) -> CLIPModel:
    """Return the scoring CLIP; its text tower becomes the pipeline's second text encoder."""
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=CLIP_IMAGE_SIZE,
        patch_size=8,
        projection_dim=TEXT_WIDTH,
        hidden_act="gelu",
    )
    text = text_config(tokenizer, "gelu")
    clip = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH)
    )
    _init_sine_positions(clip.vision_model.embeddings.position_embedding)
    return clip


def build_first_text_encoder(tokenizer: CLIPTokenizerFast) -> CLIPTextModel:
    """Return the pipeline's first text encoder; like SDXL's it uses the approximate GELU and has no projection."""
    return CLIPTextModel(text_config(tokenizer, "quick_gelu"))


def text_config(tokenizer: CLIPTokenizerFast, activation: str) -> CLIPTextConfig:
    """Return the configuration of a text encoder with three causal layers: the penultimate hidden states are the output of the second."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=1,
    )


def build_unet() -> UNet2DConditionModel:
    """Return SDXL's UNet in small: one plain and two cross-attention resolutions, `text_time` conditioning, epsilon output."""
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 96),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 3),  # as in SDXL's config: the number of heads
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + TEXT_WIDTH,
        norm_num_groups=4,
    )
    with torch.no_grad():
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.zero_()
        for module in unet.modules():
            if type(module).__name__ == "ResnetBlock2D":
                module.conv2.weight.mul_(0.1)
                module.conv2.bias.zero_()
    return unet


def build_scheduler() -> EulerDiscreteScheduler:
    """Return SDXL's sampler with SDXL's betas."""
    return EulerDiscreteScheduler(
        **NOISE_SCHEDULE,
        prediction_type="epsilon",
        interpolation_type="linear",
        timestep_spacing="leading",
        steps_offset=1,
        use_karras_sigmas=False,
    )


@torch.no_grad()
def _init_sine_positions(positions: nn.Embedding, amplitude: float = 0.3) -> None:
    """Initialize the position embeddings as two-dimensional sine waves (He et al. 2022) of the patch embeddings' amplitude.

    With CLIP's own initialization, noise of small amplitude, training ignores positions for the first thousand steps.
    """
    count, width = positions.weight.shape  # the first is the class token
    side = int((count - 1) ** 0.5)
    frequencies = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    grid = torch.cat([line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)], dim=-1)
    positions.weight[1:] = amplitude * grid.flatten(0, 1)


@torch.no_grad()
def _init_as_pyramid(vae: AutoencoderKL) -> None:
    """Initialize the encoder as 2x2 means and the decoder as nearest neighbours; nonlinear branches start ten times weaker."""
    for module in vae.modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D":
            module.conv2.weight.mul_(0.1)
            module.conv2.bias.zero_()
            if module.conv_shortcut is not None:
                _add_taps(module.conv_shortcut, [(0, 0)])
        elif kind == "Downsample2D":
            _add_taps(module.conv, [(0, 0), (0, 1), (1, 0), (1, 1)])  # diffusers pads right and bottom by one
        elif kind == "Upsample2D":
            _add_taps(module.conv, [(1, 1)])
        elif kind == "Attention":
            module.to_out[0].weight.mul_(0.1)
    for half in (vae.encoder, vae.decoder):
        _add_taps(half.conv_in, [(1, 1)])
        _add_taps(half.conv_out, [(1, 1)])
    moments = vae.encoder.conv_out
    channels = moments.weight.shape[0] // 2
    moments.weight[channels:] *= 0.1
    moments.bias[channels:] = -4.0  # little posterior noise initially
    for projection in (vae.quant_conv, vae.post_quant_conv):
        projection.weight.copy_(torch.eye(projection.weight.shape[0])[:, :, None, None])
        projection.bias.zero_()


def _add_taps(conv: nn.Conv2d, taps: Sequence[tuple[int, int]]) -> None:
    """Scale `conv` by 0.3 and add an orthogonal channel mixing, spread evenly over the kernel positions `taps`."""
    out_channels, in_channels = conv.weight.shape[:2]
    mixing: Tensor = torch.empty(out_channels, in_channels)
    if out_channels == in_channels:
        nn.init.eye_(mixing)
    else:
        nn.init.orthogonal_(mixing)
    conv.weight.mul_(0.3)
    if conv.bias is not None:
        conv.bias.zero_()
    for row, column in taps:
        conv.weight[:, :, row, column] += mixing / len(taps)
