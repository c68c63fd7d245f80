"""`search-r3` with its weights sharded over CPU processes.

accelerate shards on accelerators only; here it takes CPU processes for some. All else is what it does on GPUs.
"""

from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from search_r3.cli import main

begin = PartialState.__init__


def begin_as_accelerators(self: PartialState, *args: Any, **kwargs: Any) -> None:
    begin(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


PartialState.__init__ = begin_as_accelerators  # type: ignore[method-assign]
main()
