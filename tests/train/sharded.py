"""`search-r3` with its weights sharded over CPU processes.

accelerate shards on accelerators only; here it takes CPU processes for some. All else is what it does on GPUs.
"""

import os
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from search_r3.cli import main

DEEPSPEED = "ACCELERATE_USE_DEEPSPEED" in os.environ
begin, begin_all = PartialState.__init__, AcceleratorState.__init__


def begin_as_accelerators(self: PartialState, *args: Any, **kwargs: Any) -> None:
    begin(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        if DEEPSPEED:
            from deepspeed import comm, ops

            ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles C++
            comm.init_distributed("gloo", auto_mpi_discovery=False)
        taken = DistributedType.DEEPSPEED if DEEPSPEED else DistributedType.MULTI_GPU
        PartialState._shared_state["distributed_type"] = taken


def begin_all_as_accelerators(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    if DEEPSPEED:
        kwargs["cpu"] = False
    begin_all(self, *args, **kwargs)


PartialState.__init__ = begin_as_accelerators  # type: ignore[method-assign]
AcceleratorState.__init__ = begin_all_as_accelerators  # type: ignore[method-assign]
main()
