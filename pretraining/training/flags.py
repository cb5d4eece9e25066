"""The flags of train_accelerate.py, and what does not fit together in them."""

import math
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pretraining.checkpoints.identity import CHANGEABLE
from pretraining.cli import changed_settings, flag, parse_settings, problems_of_range
from pretraining.data.row_order import SourceOrder
from pretraining.errors import UserError
from pretraining.hub import HubFlags
from pretraining.optimization.optimizer import ADAM_BETAS, ADAM_EPSILON
from pretraining.optimization.options import LRSchedulerType, Optim, OptimOptions, SchedulerOptions
from pretraining.text.sources import Source, TextFlags, parse_mixture

AT_LEAST_ONE = """block_size per_device_train_batch_size gradient_accumulation_steps tokens_per_step max_steps
    logging_steps eval_steps eval_iters hellaswag_steps eval_tasks_steps eval_tasks_limit sample_steps save_steps
    save_total_limit
    max_nonfinite_steps ddp_timeout"""
NOT_NEGATIVE = "learning_rate weight_decay max_grad_norm warmup_steps seed dataloader_num_workers"
# Flags that do not decide the result, or whose effect a checkpoint has a record of: the data's fingerprint, the config
# and the size of the global batch, however it is split.
NEUTRAL = """output_dir data_dir dataset_name dataset_config_name dataset_revision max_train_files
    text_column train_file
    validation_file validation_split_percentage mixture tokenizer_name streaming block_size
    per_device_train_batch_size gradient_accumulation_steps tokens_per_step
    gradient_checkpointing torch_compile dataloader_num_workers
    logging_steps eval_steps eval_iters hellaswag_steps hellaswag_file
    eval_tasks eval_tasks_steps eval_tasks_limit sample_steps
    sample_prompts save_steps save_total_limit resume_from_checkpoint allow_changes report_to
    push_to_hub hub_model_id hub_strategy stock_branch hub_private_repo license config_name config_overrides
    auto_batch_size max_nonfinite_steps ddp_timeout"""


@dataclass
class DataFlags(TextFlags):
    _argument_group_name = "data: packed rows, or with --streaming text; one source or a mixture"

    data_dir: str | None = flag(
        None, "a data folder made by prepare_data.py, or token files of build-nanogpt, llm.c, nanoGPT"
    )
    streaming: bool = flag(
        False, "tokenise and pack text while training; else a --dataset_name is one that prepare_data.py packed"
    )
    mixture: list[str] | None = flag(
        None, "several sources, each a mapping of the flags above and a weight: '{data_dir: data/web, weight: 0.7}'"
    )
    tokenizer_name: str | None = flag(
        None, "with --streaming or other projects' token files: the tokenizer, if --model_name_or_path has none"
    )
    max_train_files: int | None = flag(
        None, "of a --dataset_name that holds token files, such as kjj0/fineweb10B-gpt2: the first so many; else all"
    )
    block_size: int | None = flag(None, "tokens in a row; that of the data, or 1024, if left out")
    document_attention: bool = flag(False, "documents in a row do not see each other, and positions restart in each")
    dataloader_num_workers: int = flag(0, "worker processes that read rows")


@dataclass
class ModelFlags:
    _argument_group_name = "model: from scratch, or from weights"

    config_name: str | None = flag(
        None, "start from scratch with this config: 124M, 350M, 774M, 1558M, a folder or Hub id"
    )
    config_overrides: str | None = flag(None, "changes to the default config (GPT-2 124M), as n_layer=4,n_embd=256")
    model_name_or_path: str | None = flag(
        None, "start from these weights, of this model or a stock GPT-2: a folder or Hub id"
    )
    attn_implementation: Literal["eager", "sdpa", "flex_attention", "flash_attention_2"] = flag(
        "sdpa", "attention; sdpa is torch's own, and on a CPU in bf16 one in tiles, to the same effect"
    )
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass, to save memory")
    torch_compile: bool = flag(False, "compile the model: the first steps take a minute or two, the others less time")


@dataclass
class OptimizationFlags:
    _argument_group_name = "training: steps, their size, and the optimizer"

    max_steps: int = flag(1000, "optimizer steps")
    per_device_train_batch_size: int = flag(8, "rows in a micro-batch of one process")
    gradient_accumulation_steps: int | None = flag(
        None, "micro-batches of a process in an optimizer step; 1 if left out"
    )
    tokens_per_step: int | None = flag(
        None, "tokens of all processes in an optimizer step, instead of the accumulation"
    )
    optim: Optim = flag("adamw", "the optimizer")
    optim_args: str | None = flag(
        None, "settings of the optimizer, as embedding_lr=2,muon_momentum=0.9: see docs/training.md"
    )
    adam_beta1: float = flag(ADAM_BETAS[0], "decay of AdamW's mean of gradients")
    adam_beta2: float = flag(ADAM_BETAS[1], "decay of AdamW's mean of squared gradients")
    adam_epsilon: float = flag(ADAM_EPSILON, "what AdamW adds to the root of that mean")
    learning_rate: float = flag(6e-4, "peak learning rate")
    lr_scheduler_type: LRSchedulerType = flag("cosine_with_min_lr", "the learning rate's course")
    lr_scheduler_kwargs: str | None = flag(
        None, "settings of that course, as decay_fraction=0.4,decay_type=1-sqrt: see docs/training.md"
    )
    warmup_steps: int = flag(0, "steps of linear warm-up to the peak")
    weight_decay: float = flag(0.1, "decoupled weight decay, of matrices only")
    max_grad_norm: float = flag(1.0, "the norm that gradients are clipped to; 0 does not clip")
    seed: int = flag(42, "of the initial weights, the order of the rows and dropout")


@dataclass
class EvaluationFlags:
    _argument_group_name = "watching: log, evaluations, samples; all intervals in optimizer steps"

    logging_steps: int = flag(10, "steps between training lines in the log")
    report_to: list[str] = flag(
        ["tensorboard"], "trackers to send metrics to", nargs="+", choices=["none", "tensorboard", "wandb", "trackio"]
    )
    eval_steps: int = flag(250, "steps between evaluations; there is always one after the last step")
    eval_iters: int | None = flag(
        None, "how many optimizer steps' worth of validation rows to evaluate on; all of them if left out"
    )
    hellaswag_steps: int | None = flag(
        None, "steps between evaluations on HellaSwag, and one after the last; none if left out"
    )
    hellaswag_file: str | None = flag(None, "its items, a JSON object a line; Rowan/hellaswag on the Hub if left out")
    eval_tasks: list[str] = flag(
        [], "tasks of lm-evaluation-harness to evaluate on: names, groups, small_lm, or YAML files", nargs="+"
    )
    eval_tasks_steps: int | None = flag(None, "steps between these; only after the last step if left out")
    eval_tasks_limit: int | None = flag(None, "the first so many items of each task; all if left out")
    sample_steps: int | None = flag(None, "steps between samples; only after the last step if left out")
    sample_prompts: list[str] = flag([""], "what samples begin with; the empty prompt begins a document", nargs="+")


@dataclass
class RunFlags:
    _argument_group_name = "run folder: checkpoints, going on, and what may go wrong"

    output_dir: str = flag(None, "the run folder to write (required)")
    save_steps: int = flag(500, "steps between checkpoints")
    save_total_limit: int = flag(2, "how many checkpoints to keep, beside the one with the lowest eval_loss")
    hub_strategy: Literal["end", "checkpoint"] = flag(
        "end", "with --push_to_hub: publish the final model, or that of each checkpoint too, while training goes on"
    )
    resume_from_checkpoint: str = flag("auto", "`auto` (continue if there is a checkpoint), a checkpoint, or `none`")
    allow_changes: list[str] = flag(
        [], "what may differ from the checkpoint that the run goes on from", nargs="+", choices=CHANGEABLE
    )
    auto_batch_size: bool = flag(
        False, "where a micro-batch does not fit into memory, halve it and double the accumulation"
    )
    max_nonfinite_steps: int = flag(
        3, "so many steps in a row whose loss or gradients are not finite end the run; none of them changes weights"
    )
    skip_loss_spikes: bool = flag(
        False, "leave out updates of steps whose loss is 6 standard deviations above the mean of the last 128"
    )
    ddp_timeout: int = flag(1800, "seconds after which a process that the others wait for counts as lost")


@dataclass
class TrainArguments(HubFlags, RunFlags, EvaluationFlags, OptimizationFlags, ModelFlags, DataFlags):
    """All flags, those of the last class first."""

    def problems(self) -> list[str]:
        found = [] if self.output_dir else ["--output_dir is required"]
        found += self.problems_of_sources()
        if self.gradient_accumulation_steps and self.tokens_per_step:
            found.append("--tokens_per_step works out --gradient_accumulation_steps: give one of them")
        if self.model_name_or_path and (self.config_name or self.config_overrides):
            found.append("--config_name and --config_overrides start from scratch: give them or --model_name_or_path")
        found += problems_of_range(self, AT_LEAST_ONE.split(), 1)
        for name in NOT_NEGATIVE.split():
            if not 0 <= getattr(self, name) < math.inf:
                found.append(f"--{name} must be a finite number of at least 0, got {getattr(self, name)}")
        if self.seed >= 1 << 32:
            found.append(f"--seed must be below 2^32, got {self.seed}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"--{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 < self.adam_epsilon < math.inf:
            found.append(f"--adam_epsilon must be a finite number above 0, got {self.adam_epsilon}")
        found += self.problems_of_options()
        if self.warmup_steps > self.max_steps:
            found.append(f"--warmup_steps {self.warmup_steps} is more than --max_steps {self.max_steps}")
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            found.append("--lr_scheduler_type constant has no warm-up: constant_with_warmup has --warmup_steps")
        if self.hellaswag_file and not self.hellaswag_steps:
            found.append("--hellaswag_file is for --hellaswag_steps: give both")
        if self.hellaswag_file and not Path(self.hellaswag_file).is_file():
            found.append(f"--hellaswag_file {self.hellaswag_file} is not a file")
        found += self.problems_of_tasks()
        found += self.problems_of_hub()
        if self.hub_strategy != "end" and not self.push_to_hub:
            found.append(f"--hub_strategy {self.hub_strategy} is for --push_to_hub: give both")
        if "none" in self.report_to and self.trackers():
            found.append(f"--report_to none leaves no place for {', '.join(self.trackers())}")
        for name in self.trackers():
            if find_spec(name) is None:
                found.append(f"--report_to {name}: the package is not installed, pip install {name}")
        return found

    def problems_of_tasks(self) -> list[str]:
        given = [name for name in ("eval_tasks_steps", "eval_tasks_limit") if getattr(self, name)]
        if not self.eval_tasks:
            return [f"--{name} is for --eval_tasks: give both" for name in given]
        if find_spec("lm_eval") is None:
            return ["--eval_tasks: lm-evaluation-harness is not installed, pip install lm-eval"]
        return []

    def trackers(self) -> list[str]:
        return [name for name in dict.fromkeys(self.report_to) if name != "none"]

    def optim_options(self) -> OptimOptions:
        return parse_settings("--optim_args", self.optim_args, OptimOptions)

    def scheduler_options(self) -> SchedulerOptions:
        return parse_settings("--lr_scheduler_kwargs", self.lr_scheduler_kwargs, SchedulerOptions)

    def problems_of_options(self) -> list[str]:
        found = []
        try:
            found += self.optim_options().problems(self.optim)
        except UserError as error:
            found += error.problems
        try:
            options = self.scheduler_options()
            found += options.problems(self.lr_scheduler_type, self.warmup_steps, self.max_steps)
        except UserError as error:
            found += error.problems
        return found

    def problems_of_sources(self) -> list[str]:
        found = []
        if self.mixture and self.max_train_files:
            found.append("--mixture names all sources: max_train_files belongs into an entry of it")
        if self.mixture and (self.data_dir or self.dataset_name or self.train_file):
            found.append("--mixture names all sources: leave --data_dir, --dataset_name and --train_file out")
        try:
            sources = self.sources()
        except UserError as error:
            return [*found, *error.problems]
        found += [problem for source in sources for problem in source.problems(self.streaming)]
        if not found and sources:
            try:
                SourceOrder([source.weight for source in sources], seed=[0])
            except UserError as error:
                found += error.problems
        if self.streaming and not (self.tokenizer_name or self.model_name_or_path):
            found.append("--streaming needs a --tokenizer_name, such as openai-community/gpt2")
        return found + self.problems_of_split()

    def sources(self) -> list[Source]:
        """What to train on: the entries of --mixture, or the one source that the flags name."""
        if self.mixture:
            return parse_mixture(self.mixture)
        return [Source.of(self)]

    def settings(self) -> dict:
        """The flags that decide what the trained model is, wherever it is trained and however it is watched."""
        settings = {key: value for key, value in asdict(self).items() if key not in NEUTRAL.split()}
        # However they were written. Those at their defaults are not named, as a later version may have more of them.
        for name, options in (("optim_args", self.optim_options()), ("lr_scheduler_kwargs", self.scheduler_options())):
            settings[name] = changed_settings(options)
        return settings
