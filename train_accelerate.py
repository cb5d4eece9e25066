"""
Train a GPT-2 on packed shards, or on text that is packed while it trains.

    accelerate launch --config_file accelerate_config.yaml train_accelerate.py --config configs/demo.yaml
    accelerate launch --config_file configs/cpu.yaml --cpu --quiet train_accelerate.py \\
        --data_dir data/demo --output_dir runs/small --config_overrides n_layer=2,n_embd=128,n_head=2 --max_steps 200
    accelerate launch --config_file accelerate_config.yaml train_accelerate.py --streaming \\
        --dataset_name HuggingFaceFW/fineweb-edu --dataset_config_name sample-10BT \\
        --tokenizer_name openai-community/gpt2 --output_dir runs/fineweb-edu --tokens_per_step 524288

Running the same command again continues from the last checkpoint.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, set_seed
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig
from transformers.utils.logging import disable_progress_bar

from pretraining import checkpoint, hardware, publish
from pretraining.arguments import UserError, flag, parse_arguments, run_script
from pretraining.evaluation import document_positions, evaluate, write_samples
from pretraining.launch import check_launch, on_every_process
from pretraining.mixture import Schedule, Source, parse_mixture
from pretraining.models import build_model, check_fit, load_config
from pretraining.optim import SCHEDULES, build_optimizers, learning_rate_factor, set_learning_rate
from pretraining.run import Run, open_run_folder
from pretraining.runlog import RunLog, plot_loss, read_metrics
from pretraining.sources import Split, TrainingData, open_packed

AT_LEAST_ONE = """block_size per_device_train_batch_size gradient_accumulation_steps tokens_per_step max_steps
    logging_steps eval_steps eval_iters sample_steps save_steps save_total_limit"""
NOT_NEGATIVE = "learning_rate weight_decay max_grad_norm warmup_steps seed dataloader_num_workers"
# Flags that do not decide the result, or whose effect a checkpoint has a record of: the data's fingerprint and the
# size of the global batch, however it is split.
NEUTRAL = """output_dir data_dir dataset_name dataset_config_name dataset_revision text_column train_file
    validation_file validation_split_percentage mixture tokenizer_name
    per_device_train_batch_size gradient_accumulation_steps tokens_per_step
    dataloader_num_workers logging_steps eval_steps eval_iters sample_steps sample_prompts save_steps save_total_limit
    resume_from_checkpoint report_to"""


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
    max_grad_norm: float = flag(1.0, "the norm that gradients are clipped to")
    seed: int = flag(42, "of the initial weights, the order of the rows and dropout")
    attn_implementation: Literal["eager", "sdpa", "flex_attention", "flash_attention_2"] = flag("sdpa", "attention")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass, to save memory")
    dataloader_num_workers: int = flag(0, "worker processes that read rows")

    logging_steps: int = flag(10, "steps between training lines in the log")
    eval_steps: int = flag(250, "steps between evaluations; there is always one after the last step")
    eval_iters: int = flag(None, "batches of validation rows to evaluate on; all of them if left out")
    sample_steps: int = flag(None, "steps between samples; only after the last step if left out")
    sample_prompts: list[str] = flag([""], "what samples begin with; the empty prompt begins a document", nargs="+")
    save_steps: int = flag(500, "steps between checkpoints")
    save_total_limit: int = flag(2, "how many checkpoints to keep")
    resume_from_checkpoint: str = flag("auto", "`auto` (continue if there is a checkpoint), a checkpoint, or `none`")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = flag("none", "the tracker to send metrics to")

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
        if self.report_to != "none" and find_spec(self.report_to) is None:
            found.append(f"--report_to {self.report_to}: the package is not installed, pip install {self.report_to}")
        return found

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


def main() -> None:
    args = parse_arguments(TrainArguments, __doc__)
    disable_progress_bar()  # transformers' own: there is one for the run
    if not torch.cuda.is_available():
        hardware.keep_freed_memory()
    state = PartialState(cpu=not torch.cuda.is_available())
    check_launch(state.num_processes)

    output_dir = Path(args.output_dir)
    data = open_data(args, state)
    tokenizer = data.tokenizer
    config = load_config(
        args.model_name_or_path, args.config_name, args.config_overrides, len(tokenizer), tokenizer.eos_token_id
    )
    check_fit(config, len(tokenizer), data.block_size)
    accumulation = accumulation_steps(args, data.block_size, state.num_processes)
    last_checkpoint = checkpoint.checkpoint_to_resume(output_dir, args.resume_from_checkpoint)
    if open_run_folder(output_dir, asdict(args), args.settings(), state):
        state.print(f"{output_dir} holds a finished run; to train again, delete it or choose another --output_dir")
        return

    accelerator = Accelerator(
        cpu=state.device.type == "cpu",
        # Accelerate would end an accumulation early at the end of a data loader; the rows here have no end.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=output_dir,
    )
    accelerator.init_trackers("gpt2scratch", config={key: str(value) for key, value in asdict(args).items()})
    train(args, accelerator, config, data, last_checkpoint)
    # The model first, then the process group: destroyed with a DDP model still referring to it, gloo's threads and
    # this one can wait for each other for ever.
    accelerator.free_memory()
    accelerator.end_training()


def open_data(args: TrainArguments, state: PartialState) -> TrainingData:
    if args.streaming:
        from pretraining.streamed_data import open_streams  # with `datasets`, which packed data does without

        tokenizer_name = args.tokenizer_name or args.model_name_or_path
        sources, percentage = args.sources(), args.validation_split_percentage
        return on_every_process(lambda: open_streams(sources, tokenizer_name, args.block_size, percentage))
    return open_packed(args.sources(), args.tokenizer_name, args.block_size, state)


def train(
    args: TrainArguments,
    accelerator: Accelerator,
    config: PreTrainedConfig,
    data: TrainingData,
    last_checkpoint: Path | None,
) -> None:
    """Build the model, train it from the first step or from a checkpoint to the last, and write it."""
    set_seed(args.seed)
    model = build_model(config, args.model_name_or_path, args.attn_implementation, args.gradient_checkpointing)
    num_parameters = model.num_parameters()
    optimizers = build_optimizers(model, args.optim, args.learning_rate, args.weight_decay, accelerator.device)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    set_seed(args.seed, device_specific=True)  # from here on each process has its own dropout
    checkpoint.register_model_hooks(accelerator)

    block_size, num_processes = data.block_size, accelerator.num_processes
    split = Split(
        batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=accelerator.gradient_accumulation_steps,
        num_processes=num_processes,
        process_index=accelerator.process_index,
        num_workers=args.dataloader_num_workers,
    )
    peak_flops = hardware.peak_flops(accelerator.device)
    run = Run(
        tokens_per_step=tokens_per_micro_step(args, block_size, num_processes)
        * accelerator.gradient_accumulation_steps,
        data_name=data.name,
        data_fingerprint=data.fingerprint,
        data_binding=data.binding(split),
        flops_per_token=hardware.flops_per_token(num_parameters, config.n_layer, config.n_embd, block_size),
        peak_flops=peak_flops and peak_flops * num_processes,
    )
    stream_position = None
    if last_checkpoint:
        run.resume(accelerator, last_checkpoint)
        stream_position = checkpoint.stream_position(accelerator, last_checkpoint)
        accelerator.print(f"continuing from {last_checkpoint}")
    names = ", ".join(source["name"] for source in data.sources)
    if data.statistics:
        names = f"{args.max_steps * run.tokens_per_step / data.statistics['tokens']:.2f} epochs of {names}"
    accelerator.print(
        f"{num_parameters:,} parameters, {run.tokens_per_step:,} tokens per step, {args.max_steps:,} steps, {names}; "
        f"{hardware.device_description(accelerator.device, num_processes)}, {accelerator.mixed_precision}"
    )
    batches = data.batches(split, args.seed, run.step, stream_position)
    samples = training_loop(args, run, accelerator, model, optimizers, batches, data)
    finish(args, run, accelerator, model, data, samples)


def training_loop(
    args: TrainArguments,
    run: Run,
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: list[Optimizer],
    batches: Iterator[torch.Tensor],
    data: TrainingData,
) -> list[str]:
    """Train from `run.step` to the last step. Returns the samples written after it."""
    output_dir = Path(args.output_dir)
    document_token_id = data.tokenizer.eos_token_id if args.document_attention else None
    samples: list[str] = []
    with RunLog(accelerator, output_dir, run.step, args.max_steps) as log:
        run.restart_interval()
        while run.step < args.max_steps:
            factor = learning_rate_factor(run.step, args.lr_scheduler_type, args.warmup_steps, args.max_steps)
            learning_rate = set_learning_rate(optimizers, factor)
            loss, grad_norm = train_step(
                model, optimizers, batches, accelerator, args.max_grad_norm, document_token_id
            )
            run.step += 1
            is_last = run.step == args.max_steps
            log.progress(run.step)

            if run.step % args.logging_steps == 0 or run.step == 1 or is_last:
                values = {
                    "loss": accelerator.reduce(loss, "sum").item(),
                    "learning_rate": learning_rate,
                    "grad_norm": grad_norm.item(),
                    **run.speed(),  # after .item(), which waits until the device has done the steps that are timed
                }
                if not math.isfinite(values["loss"]):
                    raise UserError(
                        f"the loss of step {run.step} is {values['loss']}: a lower --learning_rate may help"
                    )
                log.metrics(run, values)
                log.progress(run.step, loss=f"{values['loss']:.3f}", tokens_s=f"{values['tokens_per_second']:,.0f}")
            if run.step % args.eval_steps == 0 or is_last:
                batch_size = args.per_device_train_batch_size
                values = evaluate(model, data.validation, accelerator, batch_size, args.eval_iters, document_token_id)
                log.metrics(run, values)
                log.write(f"step {run.step}: " + ", ".join(f"{key} {value:.4f}" for key, value in values.items()))
                if accelerator.is_main_process:
                    plot_loss(output_dir, data.validation.compression_rates, data.validation.bytes_per_token)
                run.restart_interval()
            if is_last or (args.sample_steps and run.step % args.sample_steps == 0):
                if accelerator.is_main_process:
                    unwrapped = accelerator.unwrap_model(model)
                    samples = write_samples(unwrapped, data.tokenizer, args.sample_prompts, args.seed)
                    for sample in samples:
                        log.write(f"--- sample at step {run.step}\n{sample}\n---")
                run.restart_interval()
            if run.step % args.save_steps == 0 and not is_last:
                stream_position = batches.position() if args.streaming else None
                checkpoint.save_checkpoint(
                    accelerator, output_dir, run.position(), stream_position, args.save_total_limit
                )
                run.restart_interval()
    return samples


def train_step(
    model: nn.Module,
    optimizers: list[Optimizer],
    batches: Iterator[torch.Tensor],
    accelerator: Accelerator,
    max_grad_norm: float,
    document_token_id: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One optimizer step, over `accelerator.gradient_accumulation_steps` micro-batches.

    The loss of a step is the mean over all its tokens, of all micro-batches of all processes, so that it does not
    matter how a global batch is split. Accelerate divides by the accumulation and DDP by the processes, so both are
    multiplied back.

    Args:
        batches: micro-batches (batch_size, block_size) of token ids.
        document_token_id: see `document_positions`; None lets tokens see the documents before theirs.

    Returns:
        This process's share of the loss, in nats per token (the sum over the processes is the step's loss), and the
        norm of the gradients before clipping. Both stay on the device: reading them would wait for it.
    """
    accumulation = accelerator.gradient_accumulation_steps
    micro_batches = [next(batches).to(accelerator.device, non_blocking=True).long() for _ in range(accumulation)]
    num_targets = sum(input_ids[:, 1:].numel() for input_ids in micro_batches) * accelerator.num_processes
    total_loss = torch.zeros((), device=accelerator.device)
    for input_ids in micro_batches:
        with accelerator.accumulate(model):
            loss = model(
                input_ids=input_ids,
                position_ids=document_positions(input_ids, document_token_id),
                labels=input_ids,
                num_items_in_batch=num_targets,
                use_cache=False,
            ).loss
            accelerator.backward(loss * accumulation * accelerator.num_processes)
            total_loss += loss.detach()
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return total_loss, grad_norm


def finish(
    args: TrainArguments,
    run: Run,
    accelerator: Accelerator,
    model: nn.Module,
    data: TrainingData,
    samples: list[str],
) -> None:
    """Write the final model and its card, and say how good it is."""
    state_dict = accelerator.get_state_dict(model)  # on all processes: each may hold a part
    if not accelerator.is_main_process:
        return
    unwrapped = accelerator.unwrap_model(model)
    evaluation = [line for line in read_metrics(Path(args.output_dir)) if "eval_loss" in line][-1]
    record = publish.RunRecord(
        name=args.output_dir,
        parameters=unwrapped.num_parameters(),
        tokens=run.tokens,
        steps=run.step,
        hours=run.elapsed_seconds / 3600,
        hardware=hardware.device_description(accelerator.device, accelerator.num_processes),
        mixed_precision=accelerator.mixed_precision,
        settings=args.settings(),
        sources=data.sources,
        train_statistics=data.statistics,
        validation_statistics=data.validation.statistics,
        evaluation=evaluation,
        compression=data.validation.compression_rates,
        prompt=args.sample_prompts[0],
        samples=samples,
        versions={name: version(name) for name in ("torch", "transformers", "accelerate", "datasets", "tokenizers")},
    )
    publish.export(unwrapped, data.tokenizer, record, Path(args.output_dir), state_dict)
    yardsticks = "".join(f", {name} {rate:.3f}" for name, rate in record.compression.items())
    bits_per_byte = evaluation["eval_bits_per_byte"]
    print(f"{args.output_dir}: {bits_per_byte:.3f} bits per byte of the validation text{yardsticks}")


def tokens_per_micro_step(args: TrainArguments, block_size: int, num_processes: int) -> int:
    """Tokens that all processes together have in one forward pass."""
    return args.per_device_train_batch_size * block_size * num_processes


def accumulation_steps(args: TrainArguments, block_size: int, num_processes: int) -> int:
    """
    Micro-batches in an optimizer step.

    Raises:
        UserError: if `--tokens_per_step` is not a multiple of what all processes have at once.
    """
    if not args.tokens_per_step:
        return args.gradient_accumulation_steps or 1
    unit = tokens_per_micro_step(args, block_size, num_processes)
    steps, rest = divmod(args.tokens_per_step, unit)
    if rest or not steps:
        possible = " or ".join(str(unit * count) for count in (steps, steps + 1) if count)
        raise UserError(
            f"--tokens_per_step {args.tokens_per_step} is not a multiple of {unit} (block {block_size} x batch "
            f"{args.per_device_train_batch_size} x {num_processes} processes); nearest: {possible}"
        )
    return steps


if __name__ == "__main__":
    run_script(main)
