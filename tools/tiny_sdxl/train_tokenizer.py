"""Training of the byte-level BPE tokenizer of both text encoders: CLIP's kind, 1,024 entries, 77 tokens."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizerFast

from sdxl_pipeline.demo.shape_captions import ART_CAPTIONS, sample_caption
from sdxl_pipeline.demo.shape_world import sample_plain, sample_rich

VOCABULARY_SIZE = 1024
MAX_LENGTH = 77
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# CLIP's pattern for splitting text into words (Radford et al. 2021).
_WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


def train_tokenizer(folder: Path, seed: int = 0) -> None:
    """Write `folder`/tokenizer and `folder`/tokenizer_2, which differ in the padding token as SDXL's do.

    Merges are learned from the world's captions and, for other text, from the English of Python's
    help topics. Every byte has a token, so no text is unknown.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,  # some merges are dropped below, so more are learned than are needed
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in _bpe(tokenizer)["merges"]]
    vocabulary, kept = _clip_vocabulary(alphabet, merges)
    for name, padding in (("tokenizer", EOS), ("tokenizer_2", "!")):
        ids = {token: index for index, token in enumerate(vocabulary)}
        target = folder / name
        CLIPTokenizerFast(
            vocab=ids, merges=[tuple(pair) for pair in kept], model_max_length=MAX_LENGTH, pad_token=padding
        ).save_pretrained(target)
        # CLIP's two original files too: SDXL's folders contain them, and other programs read only these
        (target / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
        (target / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in kept))


def _bpe(tokenizer: Tokenizer) -> dict[str, list[list[str] | str]]:
    model: dict[str, list[list[str] | str]] = json.loads(tokenizer.to_str())["model"]
    return model


def _clip_vocabulary(alphabet: list[str], merges: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Return (vocabulary, merges) in CLIP's order of entries: bytes, bytes that end a word, merged tokens, then the two special tokens."""
    vocabulary = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    known, kept = set(vocabulary), []
    for first, second in merges:
        if len(vocabulary) == VOCABULARY_SIZE - 2:
            break
        if first in known and second in known and first + second not in known:
            kept.append([first, second])
            vocabulary.append(first + second)
            known.add(first + second)
    return [*vocabulary, BOS, EOS], kept


def _corpus(seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(20_000):
        yield sample_caption(sample_plain(rng, None), rng)
        yield sample_caption(sample_rich(rng), rng)
    for _ in range(500):
        yield from ART_CAPTIONS
    for text in topics.topics.values():
        yield from text.split("\n")
