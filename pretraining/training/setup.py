"""What a run opens before its model is built, and the model and optimizer that it trains."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig

from pretraining import hardware
from pretraining.checkpoints.identity import identity
from pretraining.data.packed_rows import ModelInputs
from pretraining.data.row_order import StepSplit, accumulation_steps
from pretraining.data.training_data import TrainingData, open_packed
from pretraining.distributed.launcher import told_precision
from pretraining.distributed.processes import is_sharded, on_every_process, on_main_process, open_accelerator
from pretraining.errors import UserError
from pretraining.evaluation.hellaswag_items import (
    HELLASWAG,
    EncodedItem,
    encode_items,
    hellaswag_source,
    load_hub_items,
    load_items,
)
from pretraining.evaluation.hellaswag_scoring import load_metric
from pretraining.evaluation.samples import encode_prompts
from pretraining.kernels.cpu_products import use_fastest_products
from pretraining.optimization.optimizer import build_optimizer, has_fused_adamw, parameter_groups
from pretraining.optimization.schedule import Schedule
from pretraining.precision import Precision, choose_precision, muon_dtype
from pretraining.records.task_results import TaskSource
from pretraining.tokenization.tokenizer import tokenizer_fingerprint, vocab_size_of
from pretraining.training.flags import TrainArguments
from pretraining.training.model import attention_on, build_model, check_fit, check_tokenizer, load_config

if TYPE_CHECKING:
    from pretraining.evaluation.harness import Tasks


@dataclass(frozen=True)
class Setup:
    """
    Everything that a run opens before its model is built.

    Attributes:
        precision: of the accelerator, and why it was chosen.
        split: how the rows of a step are divided; with --auto_batch_size, as they fit into memory.
        identity: what makes this run this one, see `checkpoints/identity.py`.
        hellaswag: its items, none if they are not asked for.
        tasks: of lm-evaluation-harness, None if they are not asked for.
        task_sources: what HellaSwag and the tasks are on.
    """

    args: TrainArguments
    accelerator: Accelerator
    precision: Precision
    config: PreTrainedConfig
    data: TrainingData
    split: StepSplit
    identity: dict
    hellaswag: list[EncodedItem]
    tasks: "Tasks | None"
    task_sources: list[TaskSource]

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def tokens_per_step(self) -> int:
        return self.identity["tokens_per_step"]

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule.of(self.args.settings())

    @cached_property
    def model_inputs(self) -> ModelInputs:
        document_token_id = self.data.tokenizer.eos_token_id if self.args.document_attention else None
        return ModelInputs(self.accelerator.device, self.config.vocab_size, document_token_id)


def open_setup(args: TrainArguments, state: PartialState) -> Setup:
    """
    Open the data, the model's config, the items of HellaSwag and the accelerator.

    Raises:
        UserError: on all processes, with what does not fit together.
    """
    data = open_data(args, state)
    tokenizer, vocab_size = data.tokenizer, vocab_size_of(data.tokenizer)
    config = load_config(
        args.model_name_or_path, args.config_name, args.config_overrides, vocab_size, tokenizer.eos_token_id
    )
    check_fit(config, vocab_size, data.block_size)
    if config.tie_word_embeddings and args.optim_options().head_lr != 1:
        raise UserError(
            "--optim_args: head_lr is for an output head of its own, as --config_overrides tie_word_embeddings=false "
            "makes it; a tied one has embedding_lr"
        )
    if args.model_name_or_path:
        check_tokenizer(args.model_name_or_path, tokenizer)
    encode_prompts(tokenizer, args.sample_prompts, config.n_positions)  # now, not after the last step
    hellaswag, sources = open_hellaswag(args, config, data, state) if args.hellaswag_steps else ([], [])
    tasks, more_sources = open_tasks(args) if args.eval_tasks else (None, [])
    if args.hellaswag_steps and any(source.task == "hellaswag" for source in more_sources):
        raise UserError("--hellaswag_steps and hellaswag in --eval_tasks have the same names in the log: give one")
    split = open_split(args, data.block_size, state)
    precision = on_main_process(state, lambda: choose_precision(state.device, told_precision()))
    accelerator = open_accelerator(
        state, split.gradient_accumulation_steps, args.torch_compile, precision.mixed_precision
    )
    if tasks and (problems := tasks.problems(config.n_positions, is_sharded(accelerator))):
        raise UserError(*(f"--eval_tasks: {problem}" for problem in problems))
    run_identity = identity(
        settings={**args.settings(), "mixed_precision": accelerator.mixed_precision},
        config=config,
        tokenizer=tokenizer_fingerprint(tokenizer),
        data={"name": data.name, "fingerprint": data.fingerprint},
        binding=data.binding(split),
        tokens_per_step=split.rows_per_step * data.block_size,
    )
    return Setup(
        args, accelerator, precision, config, data, split, run_identity, hellaswag, tasks, sources + more_sources
    )


def open_data(args: TrainArguments, state: PartialState) -> TrainingData:
    """Open packed rows, or streams of text."""
    if args.streaming:
        from pretraining.data.streaming import open_streams  # with `datasets`, which packed data does without

        tokenizer_name = str(args.tokenizer_name or args.model_name_or_path)
        sources, percentage = args.sources(), args.validation_split_percentage
        return on_every_process(lambda: open_streams(sources, tokenizer_name, args.block_size, percentage))
    return open_packed(args.sources(), args.tokenizer_name, args.block_size, state)


def open_hellaswag(
    args: TrainArguments, config: PreTrainedConfig, data: TrainingData, state: PartialState
) -> tuple[list[EncodedItem], list[TaskSource]]:
    """Return the items, in the protocol of the published figures that the plot shows beside them."""

    def work() -> tuple[list[EncodedItem], list[TaskSource]]:
        if state.is_main_process:
            load_metric()  # now, not when there are scores
        dataset, revision = HELLASWAG, None
        if args.hellaswag_file:
            dataset, items = Path(args.hellaswag_file).name, load_items(args.hellaswag_file)
        else:
            items, revision = load_hub_items(file_flag="--hellaswag_file", tasks_flag="--eval_tasks")
        source = hellaswag_source(dataset, revision, len(items), "completion", is_whole=True)
        return encode_items(config, data.tokenizer, items, "completion"), [source]

    return on_every_process(work)


def open_tasks(args: TrainArguments) -> "tuple[Tasks, list[TaskSource]]":
    """Find the tasks of lm-evaluation-harness, and load their data."""

    def work() -> "tuple[Tasks, list[TaskSource]]":
        from pretraining.evaluation.harness import load_tasks, sources_of  # seconds, and an extra

        tasks = load_tasks(args.eval_tasks)
        return tasks, sources_of(tasks, args.eval_tasks_limit)

    return on_every_process(work)


def open_split(args: TrainArguments, block_size: int, state: PartialState) -> StepSplit:
    """Divide the rows of a step among processes and micro-batches, as the flags ask for."""
    batch_size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps or 1
    if args.tokens_per_step:
        accumulation = accumulation_steps(args.tokens_per_step, batch_size, block_size, state.num_processes)
    return StepSplit(batch_size, accumulation, state.num_processes, state.process_index, args.dataloader_num_workers)


def build(setup: Setup) -> tuple[nn.Module, Optimizer, list[int]]:
    """Return model and optimizer as `accelerator.prepare` returns them, and the counts of `parameter_groups`."""
    args, accelerator = setup.args, setup.accelerator
    device, mixed_precision = accelerator.device, accelerator.mixed_precision
    set_seed(args.seed)
    attention = attention_on(device, mixed_precision, args.attn_implementation)
    model = build_model(setup.config, args.model_name_or_path, attention, args.gradient_checkpointing)
    # Compiled layers have products of their own.
    may_replace_products = device.type == "cpu" and mixed_precision == "no" and not args.torch_compile
    if may_replace_products and (message := use_fastest_products(model, setup.config.n_embd)):
        accelerator.print(message)
    num_parameters = [sum(map(torch.numel, group)) for group in parameter_groups(model)]
    optimizer = build_optimizer(
        model,
        args.optim,
        args.learning_rate,
        args.weight_decay,
        device,
        muon_dtype(device, mixed_precision),
        (args.adam_beta1, args.adam_beta2),
        args.adam_epsilon,
        args.optim_options(),
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, num_parameters


def summary(setup: Setup, num_parameters: list[int]) -> str:
    """
    Return three lines about what is going to happen, and warnings about the device.

    Args:
        num_parameters: counts of `parameter_groups`.
    """
    args, accelerator, data = setup.args, setup.accelerator, setup.data
    *decayed, rest = num_parameters
    tokens = args.max_steps * setup.tokens_per_step
    text = ", ".join(source["name"] for source in data.sources)
    if data.statistics:
        text = f"{tokens / data.statistics['tokens']:.2f} epochs of {text}"
    device = hardware.device_description(accelerator.device, accelerator.num_processes)
    lines = [
        f"{sum(num_parameters):,} parameters: {sum(decayed):,} with weight decay, {rest:,} without",
        f"{args.max_steps:,} steps of {setup.tokens_per_step:,} tokens, {tokens:,} in all: {text}",
        f"{device}, {setup.precision}",
    ]
    if setup.precision.warning:
        lines.append(f"warning: {setup.precision.warning}")
    if not has_fused_adamw(accelerator.device):
        lines.append(f"torch has no fused AdamW for {accelerator.device.type}: AdamW takes several kernels")
    return "\n".join(lines)
