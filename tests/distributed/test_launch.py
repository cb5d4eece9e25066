"""The launch configs and recipes in the repository say what they are meant to say."""

import sys

import pytest
from conftest import REPOSITORY, run

from pretraining.cli import parse_arguments
from pretraining.training.flags import TrainArguments

# accelerate and torchrun as they are, on a machine that says it has GPUs, up to the moment of starting processes.
LAUNCH_ON_GPUS = """
import os
import sys
import torch
import torch.distributed.run as torchrun
gpus = int(sys.argv.pop(1))
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: gpus)
config_from_args = torchrun.config_from_args
def stop(args):
    config = config_from_args(args)[0]
    print("processes:", config.nproc_per_node, "on each of", config.min_nodes)
    print("sharded:", os.environ.get("FSDP_VERSION"), os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"))
    sys.exit(0)
torchrun.config_from_args = stop
from accelerate.commands.launch import main
main()
"""


def launch_on(gpus: int, config: str, *flags: str) -> str:
    path = REPOSITORY / config
    result = run(sys.executable, "-c", LAUNCH_ON_GPUS, gpus, "--config_file", path, *flags, "train_accelerate.py")
    return result.stdout + result.stderr


@pytest.mark.parametrize(("gpus", "flags", "processes"), [(1, [], 1), (8, [], 8), (8, ["--num_processes", "4"], 4)])
def test_the_default_config_starts_a_process_for_every_gpu(gpus, flags, processes):
    output = launch_on(gpus, "accelerate_config.yaml", *flags)
    assert f"processes: {processes} on each of 1\nsharded: None None\n" in output


def test_the_other_configs_shard_over_all_gpus_and_over_machines():
    assert "processes: 8 on each of 1\nsharded: 2 GPT2ScratchDecoderLayer\n" in launch_on(8, "configs/fsdp2.yaml")
    assert "processes: 8 on each of 2\nsharded: None None\n" in launch_on(8, "configs/multi-node.yaml")


RECIPES = [path for path in (REPOSITORY / "configs").glob("*.yaml") if "\ndistributed_type" not in path.read_text()]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_a_valid_command_line(recipe):
    arguments = parse_arguments(TrainArguments, "", ["--config", str(recipe)])
    assert arguments.problems() == []
    assert arguments.output_dir and (arguments.data_dir or arguments.dataset_name)
