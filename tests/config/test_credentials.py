"""Secrets of a settings file appear in no message, dump or digest, even if the file has problems."""

import json

import pytest

from sdxl_pipeline.cli.main import main
from sdxl_pipeline.config.credentials import without_credentials
from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.data.scan.dataset_fingerprint import project_fingerprint
from sdxl_pipeline.data.sources import data_folder

SECRET = "wJalrXUtnFEMI7MDENG"
BUCKET = {"id": "cats", "type": "aws", "url": "s3://bucket/cats"}
KEYS = {"aws_access_key_id": f"AK{SECRET}", "aws_secret_access_key": SECRET, "aws_session_token": SECRET}


def test_image_dataset_repr_and_dump_contain_no_secret(write_project, tmp_path):
    project = load_project(write_project({}, [{**BUCKET, **KEYS}]))
    (dataset,) = project.datasets
    assert dataset.aws_secret_access_key is not None
    assert dataset.aws_secret_access_key.get_secret_value() == SECRET
    texts = [repr(dataset), str(dataset), repr(project), dataset.model_dump_json(), str(dataset.model_dump())]
    assert not [text for text in texts if SECRET in text]
    other = load_project(write_project({}, [{**BUCKET, **dict.fromkeys(KEYS, "another")}]))
    assert data_folder(other.datasets[0], tmp_path) == data_folder(dataset, tmp_path)
    assert project_fingerprint(other) == project_fingerprint(project)


def test_doctor_output_contains_no_secret(write_project, capsys):
    folder = write_project({}, [{**BUCKET, **KEYS}])
    assert main(["doctor", "--hardware", "cpu", str(folder)]) == 0
    assert SECRET not in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        {"aws_secret_acces_key": SECRET},
        {"aws_sesion_tokn": SECRET},
        {"--AWS_SECRET_ACCESS_KEY": SECRET},
        {"aws_secret_access_key": [SECRET]},
        {"aws_access_key_id": "AK", "aws_secret_access_key": {"value": SECRET}},
        {"aws_secret_access_key": SECRET},
        {"url": f"s3://AK:{SECRET}@bucket/cats"},
        {"url": f"https://example.org/cats/?sig={SECRET}"},
        {"aws_endpoint_url": f"https://AK:{SECRET}@example.org"},
        {"type": "csv", "csv_file": "a.csv", "url": f"https://example.org/?token={SECRET}"},
        {"caption_shuffle": {"secret": SECRET}},
        {"huggingface": {"token": SECRET}},
    ],
)
def test_problem_text_contains_no_secret(write_project, wrong):
    with pytest.raises(ProjectError) as caught:
        load_project(write_project({}, [{**BUCKET, **wrong}]))
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)
    assert SECRET not in json.dumps([str(problem.value) for problem in caught.value.problems])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://a.org/b.png", "https://a.org/b.png"),
        ("GET https://u:p@a.org/b.png?X=1&Y=2 failed", "GET https://a.org/b.png failed"),
        ("s3://k:s/e@bucket/x", "s3://bucket/x"),
        ("https://a.org:8080/b@2.png", "https://a.org:8080/b@2.png"),
        ("is it a.png? yes", "is it a.png? yes"),
    ],
)
def test_without_credentials_removes_user_info_and_query(text, expected):
    assert without_credentials(text) == expected
