"""torchrun that ends with its launcher: `python -m sdxl_pipeline.runtime.torchrun <torchrun's own arguments>`.

torchrun's agent is the process between the launcher and the ranks, and would survive a killed launcher together with all ranks. So the
agent follows the launcher, and each rank, whose parent is the agent, follows the agent.
"""

import os
import sys

from sdxl_pipeline.runtime.stage_runner import PARENT_PID_VARIABLE, follow_parent


def main() -> None:
    """Run torchrun in this process, so that the launcher stays its parent."""
    if follow_parent():
        os.environ[PARENT_PID_VARIABLE] = str(os.getpid())
    from torch.distributed.run import main as torchrun

    torchrun(sys.argv[1:])


if __name__ == "__main__":
    main()
