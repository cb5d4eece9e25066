"""The flags of train_accelerate.py, and what does not fit together in them."""

import math
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pretraining.arguments import UserError, flag
from pretraining.identity import CHANGEABLE
from pretraining.mixture import Schedule, Source, parse_mixture
from pretraining.model_card import problems_of_license
from pretraining.optim import SCHEDULES

AT_LEAST_ONE = """block_size per_device_train_batch_size gradient_accumulation_steps tokens_per_step max_steps
    logging_steps eval_steps eval_iters hellaswag_steps sample_steps save_steps save_total_limit
    max_nonfinite_steps ddp_timeout"""
NOT_NEGATIVE = "learning_rate weight_decay max_grad_norm warmup_steps seed dataloader_num_workers"
# Flags that do not decide the result, or whose effect a checkpoint has a record of: the data's fingerprint, the config
# and the size of the global batch, however it is split.
NEUTRAL = """output_dir data_dir dataset_name dataset_config_name dataset_revision text_column train_file
    validation_file validation_split_percentage mixture tokenizer_name streaming block_size
    per_device_train_batch_size gradient_accumulation_steps tokens_per_step
    gradient_checkpointing torch_compile dataloader_num_workers
    logging_steps eval_steps eval_iters hellaswag_steps hellaswag_file sample_steps
    sample_prompts save_steps save_total_limit resume_from_checkpoint allow_changes report_to
    push_to_hub hub_model_id hub_strategy hub_private_repo license config_name config_overrides
    auto_batch_size max_nonfinite_steps ddp_timeout"""


@dataclass
class TrainArguments:
    output_dir: str = flag(None, "the run folder to write")
    data_dir: str = flag(
        None, "a data folder made by prepare_data.py, or token files of build-nanogpt, llm.c, nanoGPT"
    )
    dataset_name: str = flag(None, "a dataset on the Hub: packed by prepare_data.py, or with --streaming, of text")
    dataset_config_name: str = flag(None, "its configuration, such as sample-10BT")
    dataset_revision: str = flag(None, "the commit, tag or branch of it to read")
    streaming: bool = flag(False, "tokenise and pack text while training")
    train_file: str = flag(None, "with --streaming: text files, as a glob of .txt, .jsonl or .parquet")
    validation_file: str = flag(None, "with --train_file: text for validation; else documents are kept back for it")
    validation_split_percentage: int = flag(5, "with --streaming: percentage of the documents that is kept back")
    text_column: str = flag("text", "with --streaming: the column that holds the text")
    mixture: list[str] = flag(
        None, "several sources, each a mapping of the flags above and a weight: '{data_dir: data/web, weight: 0.7}'"
    )
    tokenizer_name: str = flag(
        None, "with --streaming or other projects' token files: the tokenizer, if --model_name_or_path has none"
    )
    document_attention: bool = flag(False, "documents in a row do not see each other, and positions restart in each")
    model_name_or_path: str = flag(
        None, "start from these weights, of this model or a stock GPT-2: a folder or Hub id"
    )
    config_name: str = flag(None, "start from scratch with this config: 124M, 350M, 774M, 1558M, a folder or Hub id")
    config_overrides: str = flag(None, "changes to the default config (GPT-2 124M), as n_layer=4,n_embd=256")
    block_size: int = flag(None, "tokens in a row; that of the data, or 1024, if left out")

    per_device_train_batch_size: int = flag(8, "rows in a micro-batch of one process")
    gradient_accumulation_steps: int = flag(None, "micro-batches of a process in an optimizer step; 1 if left out")
    tokens_per_step: int = flag(None, "tokens of all processes in an optimizer step, instead of the accumulation")
    max_steps: int = flag(1000, "optimizer steps")
    learning_rate: float = flag(6e-4, "peak learning rate")
    lr_scheduler_type: Literal[SCHEDULES] = flag("cosine_with_min_lr", "the learning rate's course")
    warmup_steps: int = flag(0, "steps of linear warm-up to the peak")
    optim: Literal["adamw", "muon"] = flag("adamw", "the optimizer")
    weight_decay: float = flag(0.1, "decoupled weight decay, of matrices only")
    max_grad_norm: float = flag(1.0, "the norm that gradients are clipped to; 0 does not clip")
    seed: int = flag(42, "of the initial weights, the order of the rows and dropout")
    attn_implementation: Literal["eager", "sdpa", "flex_attention", "flash_attention_2"] = flag(
        "sdpa", "attention; sdpa is torch's own, and on a CPU in bf16 one in tiles, to the same effect"
    )
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass, to save memory")
    torch_compile: bool = flag(False, "compile the model: the first steps take a minute or two, the others less time")
    dataloader_num_workers: int = flag(0, "worker processes that read rows")

    logging_steps: int = flag(10, "steps between training lines in the log")
    eval_steps: int = flag(250, "steps between evaluations; there is always one after the last step")
    eval_iters: int = flag(
        None, "how many optimizer steps' worth of validation rows to evaluate on; all of them if left out"
    )
    hellaswag_steps: int = flag(
        None, "steps between evaluations on HellaSwag, and one after the last; none if left out"
    )
    hellaswag_file: str = flag(None, "its items, a JSON object a line; Rowan/hellaswag on the Hub if left out")
    sample_steps: int = flag(None, "steps between samples; only after the last step if left out")
    sample_prompts: list[str] = flag([""], "what samples begin with; the empty prompt begins a document", nargs="+")
    save_steps: int = flag(500, "steps between checkpoints")
    save_total_limit: int = flag(2, "how many checkpoints to keep, beside the one with the lowest eval_loss")
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
    report_to: list[str] = flag(
        ["tensorboard"], "trackers to send metrics to", nargs="+", choices=["none", "tensorboard", "wandb", "trackio"]
    )

    push_to_hub: bool = flag(False, "publish the model on the Hub")
    hub_model_id: str = flag(None, "under this name; that of the run folder if left out")
    hub_strategy: Literal["end", "checkpoint"] = flag(
        "end", "publish the final model, or the model of each checkpoint too, while training goes on"
    )
    hub_private_repo: bool = flag(False, "make the repository a private one, if it is not there yet")
    license: str = flag(None, "of the weights, for the model card, as the Hub names it; mit if left out")

    def problems(self) -> list[str]:
        found = [] if self.output_dir else ["--output_dir is required"]
        found += self.problems_of_sources()
        if self.gradient_accumulation_steps and self.tokens_per_step:
            found.append("--tokens_per_step works out --gradient_accumulation_steps: give one of them")
        if self.model_name_or_path and (self.config_name or self.config_overrides):
            found.append("--config_name and --config_overrides start from scratch: give them or --model_name_or_path")
        for name in AT_LEAST_ONE.split():
            if getattr(self, name) is not None and getattr(self, name) < 1:
                found.append(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in NOT_NEGATIVE.split():
            if not 0 <= getattr(self, name) < math.inf:
                found.append(f"--{name} must be a finite number of at least 0, got {getattr(self, name)}")
        if self.seed >= 1 << 32:
            found.append(f"--seed must be below 2^32, got {self.seed}")
        if self.warmup_steps > self.max_steps:
            found.append(f"--warmup_steps {self.warmup_steps} is more than --max_steps {self.max_steps}")
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            found.append("--lr_scheduler_type constant has no warm-up: constant_with_warmup has --warmup_steps")
        if self.hellaswag_file and not self.hellaswag_steps:
            found.append("--hellaswag_file is for --hellaswag_steps: give both")
        if self.hellaswag_file and not Path(self.hellaswag_file).is_file():
            found.append(f"--hellaswag_file {self.hellaswag_file} is not a file")
        if self.hub_model_id == "":
            found.append("--hub_model_id is empty")
        for name in ("hub_model_id", "hub_private_repo"):
            if getattr(self, name) and not self.push_to_hub:
                found.append(f"--{name} {getattr(self, name)} is for --push_to_hub: give both")
        if self.hub_strategy != "end" and not self.push_to_hub:
            found.append(f"--hub_strategy {self.hub_strategy} is for --push_to_hub: give both")
        found += problems_of_license(self.license)
        if "none" in self.report_to and self.trackers():
            found.append(f"--report_to none leaves no place for {', '.join(self.trackers())}")
        for name in self.trackers():
            if find_spec(name) is None:
                found.append(f"--report_to {name}: the package is not installed, pip install {name}")
        return found

    def trackers(self) -> list[str]:
        return [name for name in dict.fromkeys(self.report_to) if name != "none"]

    def problems_of_sources(self) -> list[str]:
        found = []
        if self.mixture and (self.data_dir or self.dataset_name or self.train_file):
            found.append("--mixture names all sources: leave --data_dir, --dataset_name and --train_file out")
        try:
            sources = self.sources()
        except UserError as error:
            return [*found, *error.problems]
        found += [problem for source in sources for problem in source.problems(self.streaming)]
        if not found and sources:
            try:
                Schedule([source.weight for source in sources], seed=[0])
            except UserError as error:
                found += error.problems
        if self.streaming and not (self.tokenizer_name or self.model_name_or_path):
            found.append("--streaming needs a --tokenizer_name, such as openai-community/gpt2")
        if not 1 <= self.validation_split_percentage <= 50:
            found.append(f"--validation_split_percentage must be 1 to 50, got {self.validation_split_percentage}")
        return found

    def sources(self) -> list[Source]:
        """What to train on: the entries of --mixture, or the one source that the flags name."""
        if self.mixture:
            return parse_mixture(self.mixture)
        names = "data_dir dataset_name dataset_config_name dataset_revision text_column train_file validation_file"
        return [Source(**{name: getattr(self, name) for name in names.split()})]

    def settings(self) -> dict:
        """The flags that decide what the trained model is, wherever it is trained and however it is watched."""
        return {key: value for key, value in asdict(self).items() if key not in NEUTRAL.split()}
