"""Fine-tuning Stable Diffusion XL as a graph of data assets."""

import sys

if sys.platform == "win32":
    # Before any other import, so that no traceback of a module that Windows lacks comes first.
    sys.exit(
        "sdxl-pipeline runs on Linux and needs WSL2 on Windows: https://learn.microsoft.com/windows/wsl/install"
    )
