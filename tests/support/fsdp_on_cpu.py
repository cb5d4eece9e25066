"""
Run a script as if this CPU were GPUs to accelerate: it then does what FSDP asks, over gloo, where it would otherwise
fall back to DDP. All else is the real thing.

    accelerate launch --config_file fsdp.yaml tests/support/fsdp_on_cpu.py train_accelerate.py ...
"""

import os
import runpy
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
torch.distributed.init_process_group("gloo")
PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
