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
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from eval_hellaswag import EncodedItem, encode_items, load_hub_items, load_items, score_on_all_processes, summarise
from pretraining import checkpoint, hardware, publish
from pretraining.arguments import UserError, parse_arguments, run_script
from pretraining.evaluation import encode_prompts, evaluate, write_samples
from pretraining.inputs import model_inputs, num_targets
from pretraining.launch import check_launch, is_sharded, on_every_process, on_main_process, open_accelerator
from pretraining.models import build_model, check_fit, load_config
from pretraining.optim import build_optimizers, learning_rate_factor, parameter_groups, set_learning_rate
from pretraining.plots import plot_hellaswag, plot_loss
from pretraining.published import comparable_losses
from pretraining.run import Run, open_run_folder, write_arguments
from pretraining.runlog import RunLog, read_metrics
from pretraining.sources import Split, TrainingData, open_packed
from pretraining.training_arguments import TrainArguments

# The speed of a run is told once so many steps are behind it: the first ones warm up, or compile.
STEPS_TO_MEASURE = 5


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
    encode_prompts(tokenizer, args.sample_prompts, config.n_positions)  # now, not after the last step
    hellaswag = open_hellaswag(args, config, data) if args.hellaswag_steps else []
    accumulation = accumulation_steps(args, data.block_size, state.num_processes)
    last_checkpoint = on_main_process(
        state, lambda: checkpoint.checkpoint_to_resume(output_dir, args.resume_from_checkpoint)
    )
    accelerator = open_accelerator(state, accumulation, args.torch_compile)
    if open_run_folder(output_dir, asdict(args), args.settings(), state, goes_on=last_checkpoint is not None):
        state.print(f"{output_dir} holds a finished run; to train again, delete it or choose another --output_dir")
        return
    train(args, accelerator, config, data, hellaswag, last_checkpoint)
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


def open_hellaswag(args: TrainArguments, config: PreTrainedConfig, data: TrainingData) -> list[EncodedItem]:
    """Its items, in the protocol of the published figures that the plot shows beside them."""

    def work() -> list[EncodedItem]:
        items = load_items(args.hellaswag_file) if args.hellaswag_file else load_hub_items()
        return encode_items(config, data.tokenizer, items, "completion")

    return on_every_process(work)


def train(
    args: TrainArguments,
    accelerator: Accelerator,
    config: PreTrainedConfig,
    data: TrainingData,
    hellaswag: list[EncodedItem],
    last_checkpoint: Path | None,
) -> None:
    """Build the model, train it from the first step or from a checkpoint to the last, and write it."""
    set_seed(args.seed)
    model = build_model(config, args.model_name_or_path, args.attn_implementation, args.gradient_checkpointing)
    groups = [sum(map(torch.numel, group)) for group in parameter_groups(model)]
    optimizers = build_optimizers(model, args.optim, args.learning_rate, args.weight_decay, accelerator.device)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    set_seed(args.seed, device_specific=True)  # from here on each process has its own dropout

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
        max_steps=args.max_steps,
        optim=args.optim,
        num_parameters=sum(groups),
        data_name=data.name,
        data_fingerprint=data.fingerprint,
        data_binding=data.binding(split),
        flops_per_token=hardware.flops_per_token(sum(groups), config.n_layer, config.n_embd, block_size),
        peak_flops=peak_flops and peak_flops * num_processes,
    )
    stream_position = None
    if last_checkpoint:
        stream_position = run.resume(accelerator, last_checkpoint, model, optimizers)
        accelerator.print(f"continuing from {last_checkpoint}")
        if accelerator.is_main_process:
            write_arguments(Path(args.output_dir), asdict(args))
            for folder in checkpoint.set_aside_later(Path(args.output_dir), run.step):
                print(f"set aside, being of what came after it before: {folder}")
    accelerator.print(summary(args, accelerator, data, run.tokens_per_step, groups))
    batches = data.batches(split, args.seed, run.step, stream_position)
    with RunLog(accelerator, Path(args.output_dir), run.step, args.max_steps, args.trackers(), asdict(args)) as log:
        training = Training(args, run, accelerator, model, optimizers, batches, data, hellaswag, log)
        training.loop()
    finish(args, run, accelerator, model, data, training.samples)


def summary(
    args: TrainArguments, accelerator: Accelerator, data: TrainingData, tokens_per_step: int, groups: list[int]
) -> str:
    """
    What is about to happen, in three lines.

    Args:
        groups: how many parameters `parameter_groups` has in each.
    """
    *decayed, rest = groups
    tokens = args.max_steps * tokens_per_step
    text = ", ".join(source["name"] for source in data.sources)
    if data.statistics:
        text = f"{tokens / data.statistics['tokens']:.2f} epochs of {text}"
    device = hardware.device_description(accelerator.device, accelerator.num_processes)
    return (
        f"{sum(groups):,} parameters: {sum(decayed):,} with weight decay, {rest:,} without\n"
        f"{args.max_steps:,} steps of {tokens_per_step:,} tokens, {tokens:,} in all: {text}\n"
        f"{device}, {accelerator.mixed_precision}"
    )


@dataclass
class Training:
    """
    The loop, and what it does now and then.

    Attributes:
        model, optimizers: as `accelerator.prepare` returned them.
        batches: micro-batches (batch_size, block_size) of this process.
        hellaswag: its items, none if it is not asked for.
        samples: the last ones written.
    """

    args: TrainArguments
    run: Run
    accelerator: Accelerator
    model: nn.Module
    optimizers: list[Optimizer]
    batches: Iterator[torch.Tensor]
    data: TrainingData
    hellaswag: list[EncodedItem]
    log: RunLog
    samples: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.output_dir = Path(self.args.output_dir)
        self.document_token_id = self.data.tokenizer.eos_token_id if self.args.document_attention else None
        self.first_step = self.run.step
        self.is_measured = False
        self.is_finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)

    def loop(self) -> None:
        """Train from `run.step` to the last step."""
        args, run = self.args, self.run
        run.restart_interval()
        while run.step < args.max_steps:
            factor = learning_rate_factor(run.step, args.lr_scheduler_type, args.warmup_steps, args.max_steps)
            learning_rate = set_learning_rate(self.optimizers, factor)
            loss, grad_norm = train_step(
                self.model, self.optimizers, self.next_micro_batches(), self.accelerator, args.max_grad_norm
            )
            run.step += 1
            if self.accelerator.scaler is None:  # fp16's leaves out steps whose gradients overflow
                self.is_finite &= torch.isfinite(grad_norm)
            is_last = run.step == args.max_steps
            self.log.progress(run.step)
            if is_last or run.step == 1 or self.is_due(args.logging_steps):
                self.write_metrics(loss, learning_rate, grad_norm)
            elif run.step == self.first_step + 1:
                run.restart_interval()  # to compile, or to warm up, is not training speed
            if is_last or self.is_due(args.eval_steps):
                self.evaluate()
            if self.hellaswag and (is_last or self.is_due(args.hellaswag_steps)):
                self.score_hellaswag()
            if is_last or self.is_due(args.sample_steps):
                self.write_samples()
            if not is_last and self.is_due(args.save_steps):
                self.save_checkpoint()

    def is_due(self, every: int | None) -> bool:
        return every is not None and self.run.step % every == 0

    def next_micro_batches(self) -> list[dict]:
        device, accumulation = self.accelerator.device, self.accelerator.gradient_accumulation_steps
        return [model_inputs(next(self.batches), device, self.document_token_id) for _ in range(accumulation)]

    def write_metrics(self, loss: torch.Tensor, learning_rate: float, grad_norm: torch.Tensor) -> None:
        run = self.run
        values = {
            "loss": self.accelerator.reduce(loss, "sum").item(),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm.item(),
            **run.speed(),  # after .item(), which waits until the device has done the steps that are timed
        }
        if not math.isfinite(values["loss"]):
            raise UserError(f"the loss of step {run.step} is {values['loss']}: a lower --learning_rate may help")
        self.check_gradients()
        self.log.metrics(run, values)
        shown = {"loss": f"{values['loss']:.3f}", "tokens/s": f"{values['tokens_per_second']:,.0f}"}
        self.log.progress(run.step, **shown, **({"MFU": f"{values['mfu']:.1%}"} if "mfu" in values else {}))
        if run.step == 1 and not self.args.model_name_or_path:
            self.warn_of_a_strange_start(values["loss"])
        if not self.is_measured and self.first_step + STEPS_TO_MEASURE <= run.step < self.args.max_steps:
            hours = (self.args.max_steps - run.step) * values["step_seconds"] / 3600
            self.log.write(
                f"{shown['tokens/s']} tokens/s: about {publish.duration(hours)} to go, evaluations not counted"
            )
            self.is_measured = True

    def check_gradients(self) -> None:
        """Before anything is made of the weights; not at each step, as to read from the device is to wait for it."""
        if not self.is_finite.item():
            raise UserError(
                f"the gradients of a step up to {self.run.step} were not finite: a lower --learning_rate may help"
            )

    def warn_of_a_strange_start(self, loss: float) -> None:
        """A model that knows nothing gives every token the same chance; its loss is ln(vocabulary), and a bit."""
        expected = math.log(self.accelerator.unwrap_model(self.model).config.vocab_size)
        if abs(loss - expected) > 0.1 * expected:
            self.log.write(
                f"warning: the first loss is {loss:.2f}, but should be about ln(vocabulary) = {expected:.2f} in an "
                "untrained model: its initial weights are of an unusual size"
            )

    def evaluate(self) -> None:
        args, run, validation = self.args, self.run, self.data.validation
        num_rows = args.eval_iters and args.eval_iters * run.tokens_per_step // self.data.block_size
        batch_size = args.per_device_train_batch_size
        self.check_gradients()
        values = evaluate(self.model, validation, self.accelerator, batch_size, num_rows, self.document_token_id)
        if not math.isfinite(values["eval_loss"]):
            raise UserError(
                f"the evaluation loss after step {run.step} is {values['eval_loss']}: a lower --learning_rate may help"
            )
        run.evaluated = run.step, values["eval_loss"]
        self.log.metrics(run, values)
        self.log.write(f"step {run.step}: " + ", ".join(f"{key} {value:.4f}" for key, value in values.items()))
        if self.accelerator.is_main_process:
            nats = math.log(2) * validation.bytes_per_token
            references = {name: rate * nats for name, rate in validation.compression_rates.items()}
            names = [source["name"] for source in self.data.sources]
            references |= comparable_losses(names, self.data.tokenizer)
            self.log.attempt("plots/loss.png", lambda: plot_loss(self.output_dir, references))
        run.restart_interval()

    def score_hellaswag(self) -> None:
        items_at_once = max(1, self.args.per_device_train_batch_size // 4)  # an item is four rows
        scores = score_on_all_processes(self.accelerator, self.plain_model(), self.hellaswag, items_at_once)
        summary = summarise(scores, "completion")
        values = {f"hellaswag_{key}": summary[key] for key in ("acc", "acc_norm", "n")}
        self.log.metrics(self.run, values)
        self.log.write(
            f"step {self.run.step}: HellaSwag acc {values['hellaswag_acc']:.4f}, "
            f"acc_norm {values['hellaswag_acc_norm']:.4f} of {values['hellaswag_n']:,} items"
        )
        if self.accelerator.is_main_process:
            self.log.attempt("plots/hellaswag.png", lambda: plot_hellaswag(self.output_dir))
        self.run.restart_interval()

    def write_samples(self) -> None:
        args, sharded = self.args, is_sharded(self.accelerator)
        if sharded or self.accelerator.is_main_process:
            model, tokenizer = self.plain_model(), self.data.tokenizer
            self.samples = write_samples(model, tokenizer, args.sample_prompts, args.seed, sharded)
        for sample in self.samples:
            self.log.write(f"--- sample at step {self.run.step}\n{sample}\n---")
        self.run.restart_interval()

    def save_checkpoint(self) -> None:
        self.check_gradients()
        stream_position = self.batches.position() if self.args.streaming else None
        checkpoint.save_checkpoint(
            self.accelerator,
            self.output_dir,
            self.model,
            self.optimizers,
            self.run.position(),
            stream_position,
            self.args.save_total_limit,
        )
        self.run.restart_interval()

    def plain_model(self) -> PreTrainedModel:
        """Not compiled: for inputs of many lengths, each of which would be compiled for."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def train_step(
    model: nn.Module,
    optimizers: list[Optimizer],
    micro_batches: list[dict],
    accelerator: Accelerator,
    max_grad_norm: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One optimizer step, over `accelerator.gradient_accumulation_steps` micro-batches.

    The loss of a step is the mean over all its labels, of all micro-batches of all processes, so that it does not
    matter how a global batch is split, nor where in it labels of -100 are. Accelerate divides by the accumulation and
    DDP and FSDP by the processes, so both are multiplied back.

    Args:
        micro_batches: the model's arguments `input_ids`, `labels` and whatever else.
        max_grad_norm: 0 does not clip.

    Returns:
        This process's share of the loss, in nats per token (the sum over the processes is the step's loss), and the
        norm of the gradients before clipping. Both stay on the device: reading them would wait for it.
    """
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes
    targets = accelerator.reduce(sum(num_targets(inputs["labels"]) for inputs in micro_batches), "sum")
    total_loss = torch.zeros((), device=accelerator.device)
    for inputs in micro_batches:
        with accelerator.accumulate(model):
            loss = model(**inputs, num_items_in_batch=targets, use_cache=False).loss
            accelerator.backward(loss * scale)
            total_loss += loss.detach()
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
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
    state_dict = checkpoint.full_weights(accelerator, model)  # on all processes: each may hold a part
    if not accelerator.is_main_process:
        return
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
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
    best = checkpoint.best_checkpoint(Path(args.output_dir))
    if best and best[1] < evaluation["eval_loss"]:
        print(f"{best[0]} ({checkpoint.BEST}) has a lower eval_loss than the final model: {best[1]:.4f}")


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
