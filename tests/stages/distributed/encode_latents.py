"""The latent stage with a second process that fails or hangs: `python -m tests.stages.distributed.encode_latents spec.json`."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from sdxl_pipeline.cache.encode import latent_encoding
from sdxl_pipeline.runtime.specs import EncodeLatentsSpec
from sdxl_pipeline.runtime.stage_runner import UserError, run_stage
from sdxl_pipeline.stages.encode_latents import main

encode_share = latent_encoding.encode_share


def encode_share_with_fault(*arguments: Any) -> latent_encoding.EncodedShare:
    if os.environ["RANK"] == "1":
        if os.environ["TROUBLE"] == "fails":
            raise UserError("the second process cannot go on")
        Path(os.environ["TROUBLE"]).write_text(str(os.getpid()))
        stop = arguments[-1]
        while True:
            stop.raise_if_requested()
            time.sleep(0.05)
    return encode_share(*arguments)


if __name__ == "__main__":
    sys.modules["sdxl_pipeline.cache.encode.latent_encoding"].encode_share = encode_share_with_fault
    run_stage(EncodeLatentsSpec, main)
