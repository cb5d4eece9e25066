"""
Train a GPT-2 on packed shards, or on text that is packed while it trains.

    accelerate launch --config_file configs/one_device.yaml --quiet train_accelerate.py \\
        --data_dir data/demo --output_dir runs/small --config_overrides n_layer=2,n_embd=128,n_head=2 --max_steps 200
    accelerate launch --config_file accelerate_config.yaml train_accelerate.py --config configs/demo.yaml
    accelerate launch --config_file accelerate_config.yaml train_accelerate.py --streaming \\
        --dataset_name HuggingFaceFW/fineweb-edu --dataset_config_name sample-10BT \\
        --tokenizer_name openai-community/gpt2 --output_dir runs/fineweb-edu --tokens_per_step 524288

The first trains on the best device of the machine, the others on all its GPUs. Running the same command again
continues from the last checkpoint.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from signal import Signals

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from accelerate.utils.memory import should_reduce_batch_size
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from pretraining import hardware
from pretraining.checkpoints.checkpoint import CheckpointWriter, full_weights, load_checkpoint
from pretraining.checkpoints.folders import BEST, best_checkpoint, checkpoint_folder, set_aside_later
from pretraining.checkpoints.identity import identity, is_same_data
from pretraining.checkpoints.run_folder import open_run_folder, write_arguments
from pretraining.checkpoints.state import LoopState, Position
from pretraining.cli import parse_arguments, run_script
from pretraining.data.model_inputs import ModelInputs
from pretraining.data.row_order import StepSplit, accumulation_steps
from pretraining.data.training_data import Batches, TrainingData, open_packed
from pretraining.distributed.launcher import told_precision
from pretraining.distributed.processes import (
    check_launch,
    is_sharded,
    on_every_process,
    on_main_process,
    open_accelerator,
    open_state,
)
from pretraining.distributed.signals import StopSignals, follow_launcher, kill_workers
from pretraining.distributed.watchdog import Watchdog
from pretraining.errors import ProcessError, UserError
from pretraining.evaluation.hellaswag_items import EncodedItem, encode_items, load_hub_items, load_items
from pretraining.evaluation.hellaswag_scoring import load_metric, score_on_all_processes, summarise
from pretraining.evaluation.samples import encode_prompts, write_samples
from pretraining.evaluation.validation import evaluate
from pretraining.precision import Precision, choose_precision, muon_dtype
from pretraining.publishing.export import export, write_tokenizer
from pretraining.publishing.model_card import RunCard, duration
from pretraining.publishing.run_publishing import CheckpointPublisher, open_repository, publish_run, try_to_publish_run
from pretraining.records.metrics import read_metrics
from pretraining.records.plots import comparable_losses, plot_hellaswag, plot_loss
from pretraining.records.progress import Run
from pretraining.records.run_files import EVENTS, HELLASWAG_PLOT, LOSS_PLOT
from pretraining.records.run_log import RunLog, send_unsent
from pretraining.tokenization.tokenizer import tokenizer_fingerprint
from pretraining.training.bad_steps import FINE, NOT_FINITE, SPIKE, Anomalies, describe, sentence
from pretraining.training.batch_size import fit_into_memory, flags_for
from pretraining.training.cpu_products import use_fastest_products
from pretraining.training.flags import TrainArguments
from pretraining.training.model import attention_on, build_model, check_fit, check_tokenizer, load_config
from pretraining.training.optimizer import build_optimizer, has_fused_adamw, parameter_groups
from pretraining.training.schedule import learning_rate_factor, muon_momentum, set_learning_rate, set_muon_momentum
from pretraining.training.step import StepResult, suspects, train_step

# The speed of a run is told once so many steps are behind it: the first ones warm up, or compile.
STEPS_TO_MEASURE = 5
DEFAULTS = TrainArguments().settings()
UNPUBLISHED = "before it was published: the same command does that"
SAVING_FAILED = -1  # among the notes of a step, where the others are numbers of signals


def main() -> None:
    args = parse_arguments(TrainArguments, __doc__)
    disable_progress_bar()  # transformers' own: there is one for the run
    follow_launcher()
    with StopSignals() as signals:
        state = open_state(args.ddp_timeout)
        check_launch(state.num_processes)
        if state.device.type == "cpu":
            hardware.keep_freed_memory()
        with Watchdog(state, args.ddp_timeout) as watchdog:
            try:
                is_stopped = start(args, state, signals, watchdog)
            except (OSError, SafetensorError) as error:
                if "No space left" in str(error) or "quota exceeded" in str(error):
                    raise ProcessError(f"the disk is full: {error}") from error
                raise
            finally:
                kill_workers()
    if is_stopped:
        sys.exit(signals.exit_status())


@dataclass(frozen=True)
class Setup:
    """
    What is there before the model, and how it is fed.

    Attributes:
        precision: of the accelerator, and why it was chosen.
        split: of a step's rows, as the flags say.
        identity: what makes this run this one, see `pretraining/checkpoints/identity.py`.
        hellaswag: its items, none if it is not asked for.
        repo_id: where to publish, None if it is not to be.
        checkpoint: to go on from, if there is one.
    """

    args: TrainArguments
    accelerator: Accelerator
    precision: Precision
    config: PreTrainedConfig
    data: TrainingData
    split: StepSplit
    identity: dict
    hellaswag: list[EncodedItem]
    repo_id: str | None
    checkpoint: Path | None
    signals: StopSignals
    watchdog: Watchdog

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    @cached_property
    def model_inputs(self) -> ModelInputs:
        document_token_id = self.data.tokenizer.eos_token_id if self.args.document_attention else None
        return ModelInputs(self.accelerator.device, self.config.vocab_size, document_token_id)


def start(args: TrainArguments, state: PartialState, signals: StopSignals, watchdog: Watchdog) -> bool:
    """Open what the flags name, and train. Returns whether a signal stopped it before its end."""
    setup = prepare(args, state, signals, watchdog)
    with open_run_folder(setup.output_dir, asdict(args), setup.identity, DEFAULTS, state) as folder:
        for message in folder.messages:
            state.print(f"{setup.output_dir}: {message}")
        is_stopped = False
        if folder.is_finished:
            send_what_was_not_sent(setup)
        else:
            is_stopped = train(replace(setup, checkpoint=folder.checkpoint))
    # The model first, then the process group: destroyed with a DDP model still referring to it, gloo's threads and
    # this one can wait for each other for ever.
    setup.accelerator.free_memory()
    setup.accelerator.end_training()
    return is_stopped


def prepare(args: TrainArguments, state: PartialState, signals: StopSignals, watchdog: Watchdog) -> Setup:
    """Open what the flags name, and find what does not fit together in it, before there is a run folder."""
    data = open_data(args, state)
    tokenizer = data.tokenizer
    config = load_config(
        args.model_name_or_path, args.config_name, args.config_overrides, len(tokenizer), tokenizer.eos_token_id
    )
    check_fit(config, len(tokenizer), data.block_size)
    if args.model_name_or_path:
        check_tokenizer(args.model_name_or_path, tokenizer)
    encode_prompts(tokenizer, args.sample_prompts, config.n_positions)  # now, not after the last step
    hellaswag = open_hellaswag(args, config, data, state) if args.hellaswag_steps else []
    repo_id = open_repository(args, state) if args.push_to_hub else None
    accumulation = args.gradient_accumulation_steps or 1
    if args.tokens_per_step:
        batch_size = args.per_device_train_batch_size
        accumulation = accumulation_steps(args.tokens_per_step, batch_size, data.block_size, state.num_processes)
    precision = on_main_process(state, lambda: choose_precision(state.device, told_precision()))
    accelerator = open_accelerator(state, accumulation, args.torch_compile, precision.mixed_precision)
    split = StepSplit(
        batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=accumulation,
        num_processes=state.num_processes,
        process_index=state.process_index,
        num_workers=args.dataloader_num_workers,
    )
    run_identity = identity(
        settings={**args.settings(), "mixed_precision": accelerator.mixed_precision},
        config=config,
        tokenizer=tokenizer_fingerprint(tokenizer),
        data={"name": data.name, "fingerprint": data.fingerprint},
        binding=data.binding(split),
        tokens_per_step=split.rows_per_step * data.block_size,
    )
    return Setup(
        args=args,
        accelerator=accelerator,
        precision=precision,
        config=config,
        data=data,
        split=split,
        identity=run_identity,
        hellaswag=hellaswag,
        repo_id=repo_id,
        checkpoint=None,
        signals=signals,
        watchdog=watchdog,
    )


def send_what_was_not_sent(setup: Setup) -> None:
    """Of a run that is finished: to trackers and the Hub, which may have been out of reach."""
    args, accelerator, output_dir = setup.args, setup.accelerator, setup.output_dir
    accelerator.print(f"{output_dir} holds a finished run; to train again, delete it or choose another --output_dir")
    send_unsent(accelerator, output_dir, args.trackers(), args.max_steps, asdict(args))
    if setup.repo_id and accelerator.is_main_process:
        setup.signals.end_at_once(UNPUBLISHED)
        publish_run(args, setup.repo_id)


def open_data(args: TrainArguments, state: PartialState) -> TrainingData:
    if args.streaming:
        from pretraining.data.streaming import open_streams  # with `datasets`, which packed data does without

        tokenizer_name = str(args.tokenizer_name or args.model_name_or_path)
        sources, percentage = args.sources(), args.validation_split_percentage
        return on_every_process(lambda: open_streams(sources, tokenizer_name, args.block_size, percentage))
    return open_packed(args.sources(), args.tokenizer_name, args.block_size, state)


def open_hellaswag(
    args: TrainArguments, config: PreTrainedConfig, data: TrainingData, state: PartialState
) -> list[EncodedItem]:
    """Its items, in the protocol of the published figures that the plot shows beside them."""

    def work() -> list[EncodedItem]:
        if state.is_main_process:
            load_metric()  # now, not when there are scores
        items = load_items(args.hellaswag_file) if args.hellaswag_file else load_hub_items()
        return encode_items(config, data.tokenizer, items, "completion")

    return on_every_process(work)


def train(setup: Setup) -> bool:
    """
    Build the model, train it from the first step or from a checkpoint to the last, and write it. Returns whether a
    signal stopped it before its end.
    """
    args, accelerator, data = setup.args, setup.accelerator, setup.data
    model, optimizer, num_parameters = build(setup)
    split = fit_into_memory(args, accelerator, model, setup.model_inputs, data.block_size, setup.split)
    set_seed(args.seed, device_specific=True)  # from here on each process has its own dropout
    run = new_run(setup, sum(num_parameters))
    anomalies = Anomalies(args.skip_loss_spikes, has_scaler=accelerator.scaler is not None)
    position = resume(setup, setup.checkpoint, model, optimizer, run, anomalies) if setup.checkpoint else None
    accelerator.print(summary(setup, run.tokens_per_step, num_parameters))
    stream = position.streams[0] if position and is_same_data(position.identity, setup.identity) else None
    batches = data.batches(split, args.seed, run.step, stream)
    is_due = position is not None and position.is_due
    card = RunCard(args, accelerator, data, setup.config, sum(num_parameters), run.tokens_per_step, setup.repo_id)
    with RunLog(accelerator, setup.output_dir, run.step, args.max_steps, args.trackers(), asdict(args), is_due) as log:
        publisher = None
        if setup.repo_id and args.hub_strategy == "checkpoint":
            private = args.hub_private_repo
            publisher = CheckpointPublisher(setup.output_dir, setup.repo_id, private, card.write, log.write)
        complete = partial(write_tokenizer, data.tokenizer, setup.config.n_positions)
        writer = CheckpointWriter(
            accelerator, setup.output_dir, model, optimizer, args.save_total_limit, complete, publisher
        )
        training = Training(setup, run, model, optimizer, split, batches, log, writer, anomalies)
        with out_of_memory_explained(args, split, run), writer:
            is_stopped = training.loop(is_due)
    if not is_stopped:
        finish(setup, model, lambda: card.at(run.step, run.elapsed_seconds, training.samples))
        if setup.repo_id and accelerator.is_main_process:
            setup.signals.end_at_once(UNPUBLISHED)
            if publisher:
                publisher.wait()
            try_to_publish_run(args, setup.repo_id)
    return is_stopped


def build(setup: Setup) -> tuple[nn.Module, Optimizer, list[int]]:
    """Model and optimizer as `accelerator.prepare` returns them, and how many parameters each group has."""
    args, accelerator = setup.args, setup.accelerator
    set_seed(args.seed)
    attention = attention_on(accelerator.device, accelerator.mixed_precision, args.attn_implementation)
    model = build_model(setup.config, args.model_name_or_path, attention, args.gradient_checkpointing)
    is_fp32_on_a_cpu = accelerator.device.type == "cpu" and accelerator.mixed_precision == "no"
    # Compiled layers have products of their own.
    may_replace = is_fp32_on_a_cpu and not args.torch_compile
    if may_replace and (message := use_fastest_products(model, setup.config.n_embd)):
        accelerator.print(message)
    num_parameters = [sum(map(torch.numel, group)) for group in parameter_groups(model)]
    dtype = muon_dtype(accelerator.device, accelerator.mixed_precision)
    optimizer = build_optimizer(
        model, args.optim, args.learning_rate, args.weight_decay, accelerator.device, muon_dtype=dtype
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, num_parameters


def new_run(setup: Setup, num_parameters: int) -> Run:
    config, peak_flops = setup.config, hardware.peak_flops(setup.accelerator.device)
    return Run(
        tokens_per_step=setup.identity["tokens_per_step"],
        flops_per_token=hardware.flops_per_token(num_parameters, config.n_layer, config.n_embd, setup.data.block_size),
        peak_flops=peak_flops and peak_flops * setup.split.num_processes,
    )


def resume(
    setup: Setup, checkpoint: Path, model: nn.Module, optimizer: Optimizer, run: Run, anomalies: Anomalies
) -> Position:
    """Take all that the checkpoint holds. Returns its position."""
    args, accelerator = setup.args, setup.accelerator
    position = load_checkpoint(accelerator, checkpoint, model, optimizer)
    run.step, run.elapsed_before = position.step, position.elapsed_seconds
    anomalies.load(position.anomalies)
    accelerator.print(f"continuing from {checkpoint}")
    if accelerator.is_main_process:
        write_arguments(setup.output_dir, asdict(args), setup.identity)
        for folder in set_aside_later(setup.output_dir, run.step):
            print(f"set aside, as this run goes on from an earlier step: {folder}")
    return position


@contextmanager
def out_of_memory_explained(args: TrainArguments, split: StepSplit, run: Run) -> Iterator[None]:
    """
    Raises:
        ProcessError: where memory runs out, with what takes less.
    """
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        less = "--gradient_checkpointing"
        if split.batch_size % 2 == 0:
            less = f"{flags_for(args, split, split.batch_size // 2)}, or {less}"
        raise ProcessError(f"out of memory in step {run.step + 1}: try {less}") from error


def summary(setup: Setup, tokens_per_step: int, num_parameters: list[int]) -> str:
    """
    Return three lines about what is going to happen, and one for each thing that the device lacks.

    Args:
        num_parameters: of each of `parameter_groups`.
    """
    args, accelerator, data = setup.args, setup.accelerator, setup.data
    *decayed, rest = num_parameters
    tokens = args.max_steps * tokens_per_step
    text = ", ".join(source["name"] for source in data.sources)
    if data.statistics:
        text = f"{tokens / data.statistics['tokens']:.2f} epochs of {text}"
    device = hardware.device_description(accelerator.device, accelerator.num_processes)
    lines = [
        f"{sum(num_parameters):,} parameters: {sum(decayed):,} with weight decay, {rest:,} without",
        f"{args.max_steps:,} steps of {tokens_per_step:,} tokens, {tokens:,} in all: {text}",
        f"{device}, {setup.precision}",
    ]
    if setup.precision.warning:
        lines.append(f"warning: {setup.precision.warning}")
    if not has_fused_adamw(accelerator.device):
        lines.append(f"torch has no fused AdamW for {accelerator.device.type}: AdamW takes several kernels")
    return "\n".join(lines)


@dataclass
class Training:
    """
    The loop, and what it does now and then.

    Attributes:
        model, optimizer: as `accelerator.prepare` returned them.
        split: of a step's rows; the batch size that fits into memory.
        batches: micro-batches (batch_size, block_size) of this process.
        samples: the last ones written.
        last_good: where this process stood before the steps in a row that were not finite.
    """

    setup: Setup
    run: Run
    model: nn.Module
    optimizer: Optimizer
    split: StepSplit
    batches: Batches
    log: RunLog
    writer: CheckpointWriter
    anomalies: Anomalies
    samples: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.args, self.accelerator, self.data = self.setup.args, self.setup.accelerator, self.setup.data
        self.signals, self.watchdog = self.setup.signals, self.setup.watchdog
        self.output_dir = self.setup.output_dir
        self.first_step = self.run.step
        self.is_measured = False
        self.last_good = self.state()

    def loop(self, is_due: bool) -> bool:
        """
        Train from `run.step` to the last step, or until a process gets a signal that asks it to end: then a checkpoint
        is saved after the step. Returns whether that was so.

        Args:
            is_due: what is due after the step behind us is still to be done, as a signal came in between.
        """
        args, run = self.args, self.run
        self.signals.defer()
        if is_due:
            self.do_what_is_due(is_saved=True)
        run.restart_interval()
        while run.step < args.max_steps:
            result, learning_rate = self.step()
            is_last = run.step == args.max_steps
            self.log.progress(run.step)
            if self.anomalies.verdict != NOT_FINITE and (is_last or run.step == 1 or self.every(args.logging_steps)):
                self.write_metrics(result, learning_rate)
            elif run.step == self.first_step + 1:
                run.restart_interval()  # to compile, or to warm up, is not training speed
            if SAVING_FAILED in result.notes:
                self.writer.wait()  # which raises what it was
            if any(result.notes) and not is_last:
                self.stop(result.notes)
                return True
            self.do_what_is_due()
        self.writer.wait()
        return False

    def note(self) -> int:
        """What the other processes have to know at the end of a step."""
        return SAVING_FAILED if self.writer.has_failed() else self.signals.received()

    def step(self) -> tuple[StepResult, float]:
        """One step, and what is to be said of it if it went wrong. Returns its result and its learning rate."""
        args, run = self.args, self.run
        if not self.anomalies.in_a_row:
            self.last_good = self.state()
        factor = learning_rate_factor(run.step, args.lr_scheduler_type, args.warmup_steps, args.max_steps)
        learning_rate = set_learning_rate(self.optimizer, factor)
        set_muon_momentum(self.optimizer, muon_momentum(run.step))
        self.watchdog.doing(f"reading the rows of step {run.step + 1}")
        rows = [next(self.batches) for _ in range(self.split.gradient_accumulation_steps)]
        self.watchdog.doing(f"in step {run.step + 1}")
        micro_batches = list(map(self.setup.model_inputs, rows))
        result = train_step(
            self.model,
            self.optimizer,
            micro_batches,
            self.accelerator,
            args.max_grad_norm,
            self.anomalies.judge,
            self.note,
        )
        run.step += 1
        if self.anomalies.verdict != FINE:
            self.report(result, rows, micro_batches)
        self.watchdog.doing(f"past step {run.step}", limited=False)
        return result, learning_rate

    def do_what_is_due(self, is_saved: bool = False) -> None:
        """Evaluations, samples and, if it is not there yet, the checkpoint that the step behind us asks for."""
        args, run = self.args, self.run
        is_last = run.step == args.max_steps
        if is_last or self.every(args.eval_steps):
            self.log_evaluation()
        if self.setup.hellaswag and (is_last or self.every(args.hellaswag_steps)):
            self.log_hellaswag()
        if is_last or self.every(args.sample_steps):
            self.log_samples()
        # Within steps that go wrong in a row there is none: it would go on in the middle of them.
        if not is_last and not is_saved and not self.anomalies.in_a_row and self.every(args.save_steps):
            self.save_checkpoint(self.state())

    def stop(self, notes: list[int]) -> None:
        """Save a checkpoint, as a process got a signal."""
        is_amid_bad_steps = self.anomalies.in_a_row > 0
        folder = self.save_last_good() if is_amid_bad_steps else self.save_checkpoint(self.state(is_due=True))
        self.writer.wait()
        process, number = next((process, number) for process, number in enumerate(notes) if number)
        of = f" of process {process}" if len(notes) > 1 else ""
        saved = f"{folder} is saved, the same command goes on from it" if folder else "there is nothing to save"
        self.log.write(f"stopped by {Signals(number).name}{of}: {saved}")

    def report(self, result: StepResult, rows: list[torch.Tensor], micro_batches: list[dict]) -> None:
        """
        Say and keep what is known of a step that went wrong.

        Raises:
            UserError: if it is the last of as many in a row as may be.
        """
        anomalies = self.anomalies
        if anomalies.verdict == SPIKE:
            to_blame = list(range(len(rows)))
        else:
            to_blame = suspects(result, self.model, self.optimizer, micro_batches, self.accelerator)
        event = describe(self.run.step, result, anomalies, to_blame, rows, self.data, self.split, self.args.seed)
        self.log.event(event)
        self.log.write(f"warning: {sentence(event)}; more in {EVENTS}")
        if anomalies.in_a_row >= self.args.max_nonfinite_steps:
            self.give_up(event)

    def give_up(self, event: dict) -> None:
        """
        Raises:
            UserError: after a checkpoint from before the steps that went wrong.
        """
        folder, run = self.save_last_good(), self.run
        self.writer.wait()
        saved = f"{folder} is from before" if folder else "there is no checkpoint from before"
        step = self.last_good.position.step
        raise UserError(
            f"{run.step - step} steps in a row were left out, the last as {sentence(event)}. {saved}: a lower "
            "--learning_rate may help (with --allow_changes learning_rate), or other data (with --allow_changes data)"
        )

    def every(self, steps: int | None) -> bool:
        """Whether the step behind us is one of every so many."""
        return steps is not None and self.run.step % steps == 0

    def state(self, is_due: bool = False) -> LoopState:
        """Where this process stands, between two steps; `is_due` as in `loop`."""
        return LoopState(
            position=Position(
                step=self.run.step,
                elapsed_seconds=self.run.elapsed_seconds,
                is_due=is_due,
                identity=self.setup.identity,
                anomalies=self.anomalies.state(),
                streams=[self.batches.position()],
            ),
            generators=hardware.generator_states(self.accelerator.device),
        )

    def write_metrics(self, result: StepResult, learning_rate: float) -> None:
        run = self.run
        values = {
            "loss": result.loss,
            "learning_rate": learning_rate,
            "grad_norm": result.grad_norm,
            **run.speed(),
        }
        self.log.metrics(run, values)
        shown = {"loss": f"{values['loss']:.3f}", "tokens/s": f"{values['tokens_per_second']:,.0f}"}
        self.log.progress(run.step, **shown, **({"MFU": f"{values['mfu']:.1%}"} if "mfu" in values else {}))
        if run.step == 1 and not self.args.model_name_or_path:
            self.warn_of_a_strange_start(values["loss"])
        if not self.is_measured and self.first_step + STEPS_TO_MEASURE <= run.step < self.args.max_steps:
            hours = (self.args.max_steps - run.step) * values["step_seconds"] / 3600
            self.log.write(f"{shown['tokens/s']} tokens/s: about {duration(hours)} to go, evaluations not counted")
            self.is_measured = True

    def warn_of_a_strange_start(self, loss: float) -> None:
        """A model that knows nothing gives every token the same chance; its loss is ln(vocabulary), and a bit."""
        expected = math.log(self.setup.config.vocab_size)
        if abs(loss - expected) > 0.1 * expected:
            self.log.write(
                f"warning: the first loss is {loss:.2f}, but should be about ln(vocabulary) = {expected:.2f} in an "
                "untrained model: its initial weights are of an unusual size"
            )

    def log_evaluation(self) -> None:
        args, run, validation = self.args, self.run, self.data.validation
        num_rows = args.eval_iters and args.eval_iters * run.tokens_per_step // self.data.block_size
        batch_size, model_inputs = self.split.batch_size, self.setup.model_inputs
        values = evaluate(self.model, validation, self.accelerator, batch_size, num_rows, model_inputs)
        if not math.isfinite(values["eval_loss"]):
            raise UserError(
                f"the evaluation loss after step {run.step} is {values['eval_loss']}: a lower --learning_rate may help"
            )
        self.log.metrics(run, values)
        self.log.write(f"step {run.step}: " + ", ".join(f"{key} {value:.4f}" for key, value in values.items()))
        if self.accelerator.is_main_process:
            nats = math.log(2) * validation.bytes_per_token
            references = {name: rate * nats for name, rate in validation.compression_rates.items()}
            names = [source["name"] for source in self.data.sources]
            references |= comparable_losses(names, self.data.tokenizer)
            self.log.attempt(LOSS_PLOT, lambda: plot_loss(self.output_dir, references))
        run.restart_interval()

    def log_hellaswag(self) -> None:
        items = self.setup.hellaswag
        items_at_once = max(1, self.split.batch_size // 4)  # an item is four rows
        scores = score_on_all_processes(self.accelerator, self.plain_model(), items, items_at_once)
        if self.accelerator.is_main_process:
            summary = summarise(items, scores, "completion")
            values = {f"hellaswag_{key}": summary[key] for key in ("acc", "acc_norm", "n")}
            self.log.metrics(self.run, values)
            self.log.write(
                f"step {self.run.step}: HellaSwag acc {values['hellaswag_acc']:.4f}, "
                f"acc_norm {values['hellaswag_acc_norm']:.4f} of {values['hellaswag_n']:,} items"
            )
            self.log.attempt(HELLASWAG_PLOT, lambda: plot_hellaswag(self.output_dir))
        self.run.restart_interval()

    def log_samples(self) -> None:
        args, sharded = self.args, is_sharded(self.accelerator)
        if sharded or self.accelerator.is_main_process:
            model, tokenizer = self.plain_model(), self.data.tokenizer
            self.samples = write_samples(model, tokenizer, args.sample_prompts, args.seed, sharded)
        for sample in self.samples:
            self.log.write(f"--- sample at step {self.run.step}\n{sample}\n---")
        self.run.restart_interval()

    def save_checkpoint(self, state: LoopState) -> Path:
        """With the weights as they are. Returns the folder that it will have."""
        self.writer.save(state)
        self.run.restart_interval()
        return checkpoint_folder(self.output_dir, state.position.step)

    def save_last_good(self) -> Path | None:
        """A checkpoint from before the steps in a row that changed no weights, if it is not there, and if any was."""
        self.writer.wait()  # for what may be that very checkpoint
        step = self.last_good.position.step
        folder = checkpoint_folder(self.output_dir, step)
        if step and not on_main_process(self.accelerator.state, folder.exists):
            self.save_checkpoint(self.last_good)
        return folder if step else None

    def plain_model(self) -> PreTrainedModel:
        """Not compiled: for inputs of many lengths, each of which would be compiled for."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def finish(setup: Setup, model: nn.Module, card: Callable[[], ModelCard]) -> None:
    """Write the final model and its card, and say how good it is."""
    accelerator, data, output_dir = setup.accelerator, setup.data, setup.output_dir
    state_dict = full_weights(accelerator, model)  # on all processes: each may hold a part
    if not accelerator.is_main_process:
        return
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    export(unwrapped, data.tokenizer, card(), output_dir, state_dict)
    evaluation = [line for line in read_metrics(output_dir) if "eval_loss" in line][-1]
    yardsticks = "".join(f", {name} {rate:.3f}" for name, rate in data.validation.compression_rates.items())
    bits_per_byte = evaluation["eval_bits_per_byte"]
    print(f"{output_dir}: {bits_per_byte:.3f} bits per byte of the validation text{yardsticks}")
    best = best_checkpoint(output_dir)
    if best and best[1] < evaluation["eval_loss"]:
        print(f"{best[0]} ({BEST}) has a lower eval_loss than the final model: {best[1]:.4f}")


if __name__ == "__main__":
    run_script(main)
