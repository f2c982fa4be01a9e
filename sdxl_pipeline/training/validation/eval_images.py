"""The tensors of the images that the eval loss is measured on."""

from collections.abc import Iterable

from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.data.samples import Sample
from sdxl_pipeline.training.validation.eval_loss import EvalImage


def read_images(samples: Iterable[Sample], reader: BatchReader, scaling_factor: float) -> list[EvalImage]:
    """The samples with the posterior mean as latents and the first caption as prompt."""
    images = []
    for sample in samples:
        posteriors = reader.posteriors([sample])
        texts = reader.text_embeds([sample], [sample.embed_keys[0]])
        images.append(
            EvalImage(
                key=sample.key,
                measured=(str(sample.latent_key), sample.embed_keys[0]),
                latents=posteriors.mean[0] * scaling_factor,
                prompt_embeds=texts.prompt_embeds[0].float(),
                pooled_prompt_embeds=texts.pooled_prompt_embeds[0].float(),
                time_ids=sample.time_ids,
            )
        )
    return images
