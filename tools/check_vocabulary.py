"""Report retired words in the names, messages, comments and documents of this repository.

    python -m tools.check_vocabulary [FILE ...]

`make lint` runs it over all tracked files. Exit status 1 and one line per hit: `file:line: "word": write replacement`.
There are three kinds of rules, so that ordinary English passes:

- PARTS: a word as part of an identifier (`snake_case`, `CamelCase`) or of a string that has the form of one, such as a metadata key.
- NAMES: a whole identifier that another one has replaced.
- PROSE: a pattern in docstrings, comments, messages, README.md and docs/. Each is narrow enough to leave the word's ordinary use alone.

To retire a word, add a row. ALLOWED holds the exceptions: words that are part of a digest's content or of a format on disk, or that have
their literal meaning.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PARTS = {
    "astray": "mismatched, missing, unexpected",
    "beginning": "resume, start",
    "depot": "cache",
    "door": "validation, entry_point",
    "drawing": "sampling, generation; rendering",
    "drawn": "sampled, generated; rendered",
    "figures": "metrics, measurements",
    "foreseen": "planned, estimated",
    "hear": "receive",
    "hears": "receives",
    "judge": "evaluate",
    "judged": "evaluated",
    "judges": "evaluates",
    "kin": "any_length_or_world_size",
    "lane": "dataset",
    "lanes": "datasets",
    "ledger": "manifest",
    "lie": "stored_in, path, location",
    "lies": "stored_in, path, location",
    "lonely": "single",
    "look": "validation; perceptual_hash",
    "looked": "validated; hashed; read",
    "looks": "validations; perceptual_hashes",
    "lot": "random_draw",
    "lots": "random_draws",
    "mend": "fix",
    "mended": "fixed",
    "ours": "actual, current",
    "patiently": "retry",
    "picture": "image",
    "pictures": "images",
    "poisoned": "nonfinite",
    "remedies": "hints",
    "remedy": "hint",
    "said": "messages, logged, reported",
    "say": "report, log; include",
    "says": "reports, logs",
    "shame": "error",
    "spoken": "label, format",
    "tell": "report, broadcast",
    "tells": "reports, broadcasts",
    "theirs": "expected, other",
    "told": "reported, logged, raised",
    "wanted": "target, required, expected",
}
NAMES = {
    "aside": "predict_no_grad",
    "BrokenProject": "InvalidProject",
    "CaptionedUNet": "UNetWithTextEncoders",
    "draw_pixels": "sample_image",
    "expected_latents": "predict_x0",
    "free_what_no_project_refers_to": "garbage_collect",
    "hold_parameters": "cast_parameters",
    "holds_parameters": "export_is_exact",
    "Idle": "UnusedSetting",
    "idle_settings": "unused_settings",
    "known_keys": "simpletuner_schema",
    "LiveTexts": "OnlineTextEncoder",
    "LocalLauncher": "LocalStageClient",
    "NoiseDraw": "NoiseSampler",
    "numeric_settings": "settings_affecting_weights",
    "own_part": "shard_like",
    "Passes": "SamplingWeights",
    "passes_per_epoch": "sampling_weights_per_epoch",
    "rate_of": "current_lr",
    "RolloutDraw": "RolloutSampler",
    "RunNames": "RunFingerprints",
    "SampleOrder": "BucketBatchSampler",
    "seed_for": "derive_seed",
    "shown_weights": "eval_weights",
    "ShownWeights": "EvalWeights",
    "StageError": "UserError",
    "taking_over": "warm_start",
    "TimestepDraw": "TimestepSampler",
    "towards_base": "prior_preservation_target",
    "under_own_settings": "rebase_state",
    "Weighed": "LossMask",
    "whole_optimizer": "full_optimizer_state_dict",
    "whole_parameters": "full_state_dict",
}
PROSE = {
    r"astray": "missing or unexpected, mismatched",
    r"by lot": "with stochastic rounding, at random",
    r"depot": "cache",
    r"divided (?:among|over|between) (?:processes|devices|GPUs|ranks|them|the processes)": "sharded",
    r"front doors?|own doors?|last door": "entry point, validation",
    r"(?:weights|numbers|kept) in few(?:er)? bits": "quantized",
    r"foreseen": "planned, estimated",
    r"(?:go|goes|gone|going|went) on (?:from|with|as|to the|there|without)": "resume, continue",
    r"hears?|heard": "receive",
    r"images? (?:that )?(?:is|are|was|were|being|be) drawn|draws? (?:validation )?images": "generate, sample",
    r"judge[sd]?|judging": "evaluate, compare, measure",
    r"kin": "any length or world size",
    r"lanes?": "dataset, assets of a dataset",
    r"ledger": "manifest",
    r"lies?|lying|lay (?:in|at|under|on|beside)": "is stored in, is in, path, location",
    r"lonely": "single",
    r"look-?alikes?": "near-duplicates",
    r"(?:a|an|each|every|the|last|first|second|next|previous|this|such|two|no|validation) looks?(?! (?:at|up|for|like))": "validation",
    r"mend(?:s|ed|ing)?": "fix",
    r"patiently": "with retries",
    r"pictures?": "image",
    r"poison(?:s|ed|ing)?": "propagate non-finite values",
    r"remed(?:y|ies)": "hint, fix",
    r"(?:is|are|was|were|be|and) said(?! to)|say(?:s|ing)? so|said so": "is reported, is logged",
    r"spoken": "readable, labelled",
    r"stands? (?:in|at|beside|under|before|among)": "is in, is stored in, is next to",
    r"stood (?:in|at|beside|under|before|among)": "was in",
    r"(?:taken|taking) over": "imported, warm start",
    r"tells?(?! (?:\w+ ){0,4}apart)": "report, log, show",
    r"told(?! apart)": "reported, logged, shown",
    r"what is ill|that is ill": "broken",
    r"whole (?:UNets?|weights|parameters|optimizer)": "full",
}
# (file, word): why the word stays
ALLOWED: dict[tuple[str, str], str] = {
    ("sdxl_pipeline/cache/encode/cache_keys.py", "picture"): "content of a store key",
    ("sdxl_pipeline/data/quality/perceptual_hash.py", "looks"): "metadata key of files on disk",
    ("assets/dataset.py", "looks"): "name of a file on disk",
    ("sdxl_pipeline/data/sources/download.py", "ledger"): "name of a file on disk",
    ("sdxl_pipeline/demo/shape_captions.py", "picture"): "words of the bundled model's captions",
    ("sdxl_pipeline/evaluation/evaluation_identity.py", "pictures"): "content of an identity",
    ("sdxl_pipeline/evaluation/report.py", "figures"): "key of report.json",
    ("sdxl_pipeline/release/model_card.py", "figures"): "key of report.json",
    ("sdxl_pipeline/runtime/specs.py", "kin"): "key of files on disk",
    ("sdxl_pipeline/training/data/samples.py", "picture"): "content of a seed",
    ("sdxl_pipeline/training/data/samples.py", "told"): "content of a digest",
    ("tests/corpus/pipeline.py", "looks"): "name of a file on disk",
    ("tests/corpus/test_changing.py", "looks"): "name of a file on disk",
    ("tests/data/sources/test_object_store.py", "ledger"): "name of a file on disk",
    ("tests/release/test_export.py", "figures"): "key of report.json",
    ("tests/stages/test_evaluate.py", "figures"): "key of report.json",
    ("tests/training/checkpoint/test_checkpoints.py", "kin"): "key of files on disk",
    ("tests/tools/tiny_sdxl/test_bundle.py", "drawn"): "keys of figures.json",
    ("tests/tools/tiny_sdxl/test_bundle.py", "figures"): "name of a file",
    ("tools/tiny_sdxl/bundle_card.py", "drawn"): "keys of figures.json",
    ("tools/tiny_sdxl/bundle_card.py", "figures"): "name of a file",
}
SKIPPED = ("tools/check_vocabulary.py", "tests/tools/test_check_vocabulary.py", "docs/settings.md")

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*(?:[.-]\w+)*")
_PROSE = [(re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE), written) for pattern, written in PROSE.items()]
_ANY_PROSE = re.compile(rf"\b(?:{'|'.join(PROSE)})\b", re.IGNORECASE)
# Names, strings and comments are all that is read; one expression finds them ten times as fast as the module `tokenize`.
_TOKEN = re.compile(
    r"""(?P<prefix>[rbfu]{0,2})(?P<quote>\"{3}|'{3}|["'])(?P<string>(?:\\.|(?!(?P=quote)).)*)(?P=quote)"""
    r"""|\#(?P<comment>[^\n]*)|(?P<name>[^\W\d]\w*)""",
    re.DOTALL | re.IGNORECASE,
)
_FIELD = re.compile(r"(?<!\{)\{([^{}]+)\}")


@dataclass(frozen=True)
class Hit:
    """A retired word."""

    file: str
    line: int
    word: str
    replacement: str

    def __str__(self) -> str:
        return f'{self.file}:{self.line}: "{self.word}": write {self.replacement}'


@cache
def check_names(text: str) -> tuple[tuple[str, str], ...]:
    """Return (retired word, replacement) of each retired part of the identifier `text`."""
    words = [word.lower() for word in _WORDS.findall(text)]
    found = [(text, NAMES[text])] if text in NAMES else []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word in PARTS and not (word.startswith("look") and following in ("up", "ahead")):
            found.append((word, PARTS[word]))
    return tuple(found)


def check_prose(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line within `text` from 0, retired phrase, replacement)."""
    if _ANY_PROSE.search(text):
        for pattern, replacement in _PROSE:
            for match in pattern.finditer(text):
                yield text.count("\n", 0, match.start()), match.group().lower(), replacement


def check_python(file: str, text: str) -> Iterator[Hit]:
    """Yield the hits in the names, strings and comments of a module, and in its own name."""
    line, last = 1, 0
    yield from (Hit(file, 1, *found) for found in check_names(Path(file).stem))
    for token in _TOKEN.finditer(text):
        line, last = line + text.count("\n", last, token.start()), token.start()
        names, prose = [token["name"] or ""], token["comment"] or ""
        if string := token["string"]:
            if "f" in token["prefix"].lower():
                names = [name for field in _FIELD.findall(string) for name in _IDENTIFIER.findall(field)]
                string = _FIELD.sub("{}", string)
            names, prose = ([string], "") if _IDENTIFIER.fullmatch(string) else (names, string)
        for name in names:
            yield from (Hit(file, line, *found) for found in check_names(name))
        for offset, word, replacement in check_prose(prose):
            yield Hit(file, line + offset, word, replacement)


def check_markdown(file: str, text: str) -> Iterator[Hit]:
    """Yield the hits in a document."""
    for offset, word, replacement in check_prose(text):
        yield Hit(file, 1 + offset, word, replacement)


def check_file(file: str, text: str) -> list[Hit]:
    """Return the hits in a file, given its path relative to the repository, without those of ALLOWED."""
    check = check_python if file.endswith(".py") else check_markdown
    return [hit for hit in check(file, text) if (file, hit.word) not in ALLOWED]


def tracked_files(repository: Path) -> list[str]:
    """Return the tracked Python files and the documents: README.md, CONTRIBUTING.md, CHANGELOG.md, docs/."""
    patterns = ("*.py", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md")
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=repository, check=True, capture_output=True, text=True
    )
    return [
        file for file in listed.stdout.splitlines() if file not in SKIPPED and (repository / file).exists()
    ]


def main() -> int:
    """Print every hit in the given files, by default in all tracked ones, and return the exit status."""
    repository = Path(__file__).resolve().parents[1]
    files = sys.argv[1:] or tracked_files(repository)
    hits = [
        hit for file in files for hit in check_file(file, (repository / file).read_text(encoding="utf-8"))
    ]
    sys.stdout.writelines(f"{hit}\n" for hit in hits)
    if hits:
        sys.stderr.write(
            f"{len(hits)} retired words. The tables in tools/check_vocabulary.py explain them.\n"
        )
    return 1 if hits else 0


if __name__ == "__main__":
    sys.exit(main())
