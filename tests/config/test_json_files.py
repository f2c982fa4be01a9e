"""Invalid JSON and repeated keys are reported with their position."""

import os

import pytest

from sdxl_pipeline.config.json_files import read_json


def read(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_json(path, "an object")


def test_read_json_syntax_error_contains_line_and_column(tmp_path):
    content, (problem,) = read(tmp_path, '{\n  "a": 1\n  "b": 2\n}')
    assert content is None
    assert "line 3, column 3" in problem.message
    assert '"b": 2' in problem.hint


@pytest.mark.parametrize(
    "text", ["", "   ", '{"a": 1,}', "{'a': 1}", '{"a": NaN}', '{"a": -Infinity}', "[" * 100_000]
)
def test_read_json_invalid_json_is_a_problem(tmp_path, text):
    content, (problem,) = read(tmp_path, text)
    assert content is None
    assert problem.file.name == "file.json"


def test_read_json_repeated_keys_are_reported_with_their_position(tmp_path):
    content, problems = read(tmp_path, '[{"id": "a", "id": "b", "more": {"x": 1, "x": 1}}, {"id": "c"}]')
    assert content[1] == {"id": "c"}
    assert [(problem.key, problem.value) for problem in problems] == [
        ("[1].id", ["a", "b"]),
        ("[1].more.x", [1, 1]),
    ]


def test_read_json_accepts_a_byte_order_mark_and_rejects_other_encodings(tmp_path):
    assert read(tmp_path, b'\xef\xbb\xbf{"a": 1}') == ({"a": 1}, [])
    _, (problem,) = read(tmp_path, '{"a": "é"}'.encode("latin-1"))
    assert "UTF-8" in problem.message


def test_read_json_of_a_folder_is_a_problem(tmp_path):
    (tmp_path / "file.json").mkdir()
    _, (problem,) = read_json(tmp_path / "file.json", "an object")
    assert "cannot be read" in problem.message


def test_read_json_of_null_is_a_problem(tmp_path):
    content, (problem,) = read(tmp_path, " null\n")
    assert content is None
    assert problem.message == "contains null"
    assert problem.hint == "write an object"


def test_read_json_of_a_pipe_or_device_is_a_problem_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "endless.json"):
        content, (problem,) = read_json(tmp_path / name, "an object")
        assert content is None
        assert "not a file" in problem.message
