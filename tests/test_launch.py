"""The launch configs and recipes in the repository say what they are meant to say."""

import sys

import pytest
from conftest import REPOSITORY, run

from pretraining.arguments import parse_arguments
from train_accelerate import TrainArguments

# accelerate and torchrun as they are, on a machine that says it has GPUs, up to the moment of starting processes.
LAUNCH_ON_GPUS = """
import sys
import torch
import torch.distributed.run as torchrun
gpus = int(sys.argv.pop(1))
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: gpus)
config_from_args = torchrun.config_from_args
def stop(args):
    print("processes:", config_from_args(args)[0].nproc_per_node)
    sys.exit(0)
torchrun.config_from_args = stop
from accelerate.commands.launch import main
main()
"""


@pytest.mark.parametrize(("gpus", "flags", "processes"), [(1, [], 1), (8, [], 8), (8, ["--num_processes", "4"], 4)])
def test_the_default_config_starts_a_process_for_every_gpu(gpus, flags, processes):
    config = REPOSITORY / "accelerate_config.yaml"
    result = run(sys.executable, "-c", LAUNCH_ON_GPUS, gpus, "--config_file", config, *flags, "train_accelerate.py")
    assert f"processes: {processes}\n" in result.stdout, result.stderr


RECIPES = [path for path in (REPOSITORY / "configs").glob("*.yaml") if "distributed_type" not in path.read_text()]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_a_valid_command_line(recipe):
    arguments = parse_arguments(TrainArguments, "", ["--config", str(recipe)])
    assert arguments.problems() == []
    assert arguments.output_dir and arguments.data_dir
