"""The tensors of the pictures that the eval loss is measured on."""

from collections.abc import Iterable

from sdxl_pipeline.training.batches import BatchReader
from sdxl_pipeline.training.eval_loss import EvalPicture
from sdxl_pipeline.training.samples import Sample


def read_pictures(samples: Iterable[Sample], reader: BatchReader, scaling_factor: float) -> list[EvalPicture]:
    """The samples with the posterior mean as latents and the first caption as prompt."""
    pictures = []
    for sample in samples:
        posteriors = reader.posteriors([sample])
        texts = reader.text_embeds([sample], [sample.embed_keys[0]])
        pictures.append(
            EvalPicture(
                key=sample.key,
                measured=(str(sample.latent_key), sample.embed_keys[0]),
                latents=posteriors.mean[0] * scaling_factor,
                prompt_embeds=texts.prompt_embeds[0].float(),
                pooled_prompt_embeds=texts.pooled_prompt_embeds[0].float(),
                time_ids=sample.time_ids,
            )
        )
    return pictures
