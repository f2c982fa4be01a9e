"""Platforms other than Linux: no Unix-only imports, and one message on Windows."""

import subprocess
import sys

import pytest

from sdxl_pipeline.definitions import REPOSITORY

IMPORT_ALL = """
import builtins, importlib, pkgutil, sys

PACKAGES = ("sdxl_pipeline", "assets", "resources")
imports = builtins.__import__

def without_unix(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    # psutil needs `resource` on Linux; fcntl is hidden from every importer
    if name == "fcntl" or (name == "resource" and importer.split(".")[0] in PACKAGES):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return imports(name, globals, locals, fromlist, level)

sys.modules.pop("fcntl", None)
builtins.__import__ = without_unix
failed = []
for package in map(importlib.import_module, PACKAGES):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except Exception as error:
            failed.append(f"{module.name}: {type(error).__name__}: {error}")
assert "fcntl" not in sys.modules
print("\\n".join(failed))
"""


@pytest.mark.slow
def test_all_modules_without_fcntl_and_resource_import():
    process = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert (process.stdout.strip(), process.returncode) == ("", 0), process.stderr


@pytest.mark.parametrize(
    "command",
    [
        "from sdxl_pipeline.cli.main import main; main(['doctor'])",
        "import sdxl_pipeline.definitions",
        "from sdxl_pipeline.stages import train",
    ],
)
def test_entry_points_on_windows_exit_with_a_message_about_wsl2(command: str):
    code = f"import sys; sys.platform = 'win32'; {command}"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert process.returncode == 1
    assert process.stderr.splitlines() == [
        "sdxl-pipeline runs on Linux and needs WSL2 on Windows: https://learn.microsoft.com/windows/wsl/install"
    ]
