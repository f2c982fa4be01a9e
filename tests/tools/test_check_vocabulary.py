"""Tests of the vocabulary check: each kind of rule finds its words, and ordinary English passes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.check_vocabulary import ALLOWED, check_file, check_names, tracked_files

REPOSITORY = Path(__file__).parents[2]


def words_in(text: str, file: str = "package/module.py") -> list[tuple[int, str]]:
    return [(hit.line, hit.word) for hit in check_file(file, text)]


@pytest.mark.parametrize(
    ("identifier", "words"),
    [
        ("told_h", ["told"]),
        ("LookTimes", ["look"]),
        ("_LEDGER_FILE", ["ledger"]),
        ("taking_over", ["taking_over"]),
        ("StageError", ["StageError"]),
        ("lookup", []),
        ("look_up", []),
        ("headroom", []),
        ("kind", []),
        ("allotted", []),
        ("UserError", []),
    ],
)
def test_check_names_retired_parts_and_names_are_found(identifier, words):
    assert [word for word, _ in check_names(identifier)] == words


def test_check_file_python_reports_line_of_names_strings_and_comments():
    text = (
        '"""Docstring.\n\nThe images that lie in a folder.\n"""\n'
        "wanted = 1  # rounded by lot\n"
        'message = f"{astray} keys, {len(kin):,}"\n'
        'metadata = {"looks_taken": 1, "a": \'it is told\'}\n'
        'raise ValueError("Say so.")\n'
    )
    assert words_in(text) == [
        (3, "lie"),
        (5, "wanted"),
        (5, "by lot"),
        (6, "astray"),
        (6, "kin"),
        (7, "looks"),
        (7, "told"),
        (8, "say so"),
    ]


@pytest.mark.parametrize(
    "sentence",
    [
        "Images that look alike are listed side by side.",
        "Look up the key in the index; take a look at the log if it is missing.",
        "The documentation says that betas are a pair.",
        "What goes on in the background does not block the loop.",
        "A file whose name does not tell JPEG and PNG apart is read by its content.",
        "Draw a random timestep for each sample.",
        "The test passes on two processes.",
        "There is no room on the disk. The figure shows the loss.",
        "The parameter belongs to a frozen layer, from the beginning.",
        "A lot of memory, lots of images; an idle GPU.",
        "This applies to the whole folder.",
    ],
)
def test_check_file_ordinary_english_passes(sentence):
    assert words_in(f'"""{sentence}"""\n# {sentence}\n') == []
    assert words_in(sentence, "docs/page.md") == []


def test_check_file_markdown_is_read_as_prose():
    assert words_in("# Title\n\nA lane is told.\n`wanted`\n", "docs/page.md") == [(3, "lane"), (3, "told")]


def test_check_file_hash_and_quotes_within_strings_are_no_comments():
    assert words_in("a = '# told'\nb = \"it's # fine\"\nc = 'told_h'\n") == [(1, "told"), (3, "told")]


def test_check_file_module_name_is_checked():
    assert words_in("", "package/looks.py") == [(1, "looks")]


def test_check_file_allowed_words_apply_to_their_file_only():
    (file, word), *_ = ALLOWED
    text = f'key = "{word}"\n'
    assert words_in(text, file) == []
    assert words_in(text, "package/other.py") == [(1, word)]


def test_allowed_every_exception_is_needed():
    for file, word in ALLOWED:
        assert word in (REPOSITORY / file).read_text(encoding="utf-8"), (file, word)


def test_main_hit_is_printed_with_file_line_and_replacement(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("\nremedy = 1\n", encoding="utf-8")
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tools.check_vocabulary", str(file)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert time.monotonic() - started < 30
    assert done.returncode == 1
    assert done.stdout == f'{file}:2: "remedy": write hint\n'


def test_tracked_files_include_modules_tests_and_documents():
    files = tracked_files(REPOSITORY)
    assert {"README.md", "docs/training.md", "sdxl_pipeline/training/trainer.py", "tests/conftest.py"} <= {
        *files
    }
