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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from transformers.utils.logging import disable_progress_bar

from pretraining import hardware
from pretraining.checkpoints.checkpoint import CheckpointWriter
from pretraining.checkpoints.identity import is_same_data
from pretraining.checkpoints.run_folder import open_run_folder, resume
from pretraining.cli import parse_arguments, run_script
from pretraining.data.packed_rows import num_targets
from pretraining.data.training_data import Batches
from pretraining.distributed.processes import check_launch, open_state
from pretraining.distributed.signals import StopSignals, follow_launcher, kill_workers
from pretraining.distributed.watchdog import Watchdog
from pretraining.errors import ProcessError, UserError
from pretraining.publishing.export import write_tokenizer
from pretraining.publishing.model_card import RunCard
from pretraining.publishing.run_publishing import (
    CheckpointPublisher,
    open_repository,
    publish_run,
    try_to_publish_run,
    write_final_model,
)
from pretraining.records.progress import Progress
from pretraining.records.run_files import EVENTS
from pretraining.records.run_log import RunLog
from pretraining.training.bad_steps import (
    FINE,
    NOT_FINITE,
    SPIKE,
    BadSteps,
    describe_bad_step,
    format_event,
    suspect_micro_batches,
)
from pretraining.training.batch_size import fit_into_memory, out_of_memory_explained
from pretraining.training.flags import TrainArguments
from pretraining.training.reports import Reports
from pretraining.training.saving import Saver
from pretraining.training.setup import Setup, build, open_setup, summary
from pretraining.training.step import StepResult, gather_result

DEFAULTS = TrainArguments().settings()
BEFORE_PUBLISHING = "before it was published: the same command does that"


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
                is_stopped = run(args, state, signals, watchdog)
            except (OSError, SafetensorError) as error:
                if "No space left" in str(error) or "quota exceeded" in str(error):
                    raise ProcessError(f"the disk is full: {error}") from error
                raise
            finally:
                kill_workers()
    if is_stopped:
        sys.exit(signals.exit_status())


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    micro_batches: list[dict],
    accelerator: Accelerator,
    max_grad_norm: float,
    bad_steps: BadSteps | None = None,
    signals: StopSignals | None = None,
    writer: CheckpointWriter | None = None,
) -> StepResult:
    """
    Train one optimizer step, over `accelerator.gradient_accumulation_steps` micro-batches.

    The loss of a step is the mean over all its labels, of all micro-batches of all processes, so that it does not
    matter how a global batch is split, nor where in it labels of -100 are. Accelerate divides by the accumulation, and
    DDP and FSDP by the processes, so both are multiplied back.

    Args:
        micro_batches: the model's arguments `input_ids`, `labels` and whatever else.
        max_grad_norm: 0 does not clip.
        bad_steps: decides whether the update is applied, and keeps its verdict. By default the update is applied if
            loss and gradients are finite.
        signals, writer: asked whether a signal came, or a checkpoint could not be saved; see `StepResult`.
    """
    num_labels = accelerator.reduce(sum(num_targets(inputs["labels"]) for inputs in micro_batches), "sum")
    undo_averaging = accelerator.gradient_accumulation_steps * accelerator.num_processes
    losses = []
    for inputs in micro_batches:
        with accelerator.accumulate(model):
            loss = model(**inputs, num_items_in_batch=num_labels, use_cache=False).loss
            accelerator.backward(loss * undo_averaging)
            losses.append(loss.detach())
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    stop_signal = signals.received() if signals else 0
    result = gather_result(accelerator, losses, grad_norm, stop_signal, bool(writer and writer.has_failed()))
    if (bad_steps or BadSteps()).judge(result):
        optimizer.step()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()  # lowers the scale after an overflow, and forgets these gradients
    optimizer.zero_grad()
    return result


@dataclass
class Training:
    """
    The training loop.

    Attributes:
        model, optimizer: as `accelerator.prepare` returned them.
        batches: micro-batches (batch_size, block_size) of this process.
    """

    setup: Setup
    model: nn.Module
    optimizer: Optimizer
    progress: Progress
    batches: Batches
    bad_steps: BadSteps
    log: RunLog
    reports: Reports
    writer: CheckpointWriter
    saver: Saver
    signals: StopSignals
    watchdog: Watchdog

    def __post_init__(self) -> None:
        self.args, self.accelerator = self.setup.args, self.setup.accelerator

    def train(self, evaluation_pending: bool) -> bool:
        """
        Train until the last step, or until a process receives a signal that asks it to end: then a checkpoint is saved
        after the step. After each step come its log line, the end by a signal, and, at the head of the next round,
        evaluations, samples and the checkpoint: a run that is stopped does not wait for its evaluations.

        Args:
            evaluation_pending: the evaluations of the step before the first one are still to be done, as a signal came
                in between.

        Returns:
            True if a signal ended it.
        """
        args, progress, reports, bad_steps = self.args, self.progress, self.reports, self.bad_steps
        first_step = progress.step
        self.signals.defer()
        while True:
            # Once in a while: evaluate, sample, save.
            if evaluation_pending:
                if self.due(args.eval_steps):
                    reports.evaluation()
                if self.setup.hellaswag and self.due(args.hellaswag_steps):
                    reports.hellaswag()
                if self.setup.tasks and self.due(args.eval_tasks_steps):
                    reports.tasks()
                if self.due(args.sample_steps):
                    reports.sample()
                is_between = first_step < progress.step < args.max_steps  # the others are saved, or become the model
                # A checkpoint within bad steps in a row would be resumed in the middle of them.
                if is_between and not bad_steps.not_finite_in_a_row and self.due(args.save_steps):
                    self.saver.save(self.saver.position())
            if progress.step == first_step:
                progress.restart_interval()  # what came before the first step is not training speed
            if progress.step == args.max_steps:
                self.writer.wait()
                return False

            # One training step.
            if not bad_steps.not_finite_in_a_row:
                self.saver.last_good = self.saver.position()
            learning_rate = self.setup.schedule.set(self.optimizer, progress.step)
            self.watchdog.doing(f"reading the rows of step {progress.step + 1}")
            rows = [next(self.batches) for _ in range(self.setup.split.gradient_accumulation_steps)]
            self.watchdog.doing(f"in step {progress.step + 1}")
            micro_batches = [self.setup.model_inputs(each) for each in rows]
            result = train_step(
                self.model,
                self.optimizer,
                micro_batches,
                self.accelerator,
                args.max_grad_norm,
                bad_steps,
                self.signals,
                self.writer,
            )
            progress.step += 1
            if bad_steps.verdict != FINE:
                self.report_bad_step(result, rows, micro_batches)
            self.watchdog.doing(f"past step {progress.step}", limited=False)

            # Log it, and stop before evaluations that may take long.
            self.log.show_progress(progress.step)
            if bad_steps.verdict != NOT_FINITE and (progress.step == 1 or self.due(args.logging_steps)):
                reports.training(result, learning_rate)
            elif progress.step == first_step + 1:
                progress.restart_interval()  # nor is the first step, which compiles or warms up
            if result.save_failed:
                self.writer.wait()  # which raises the reason
            if any(result.stop_signals) and progress.step < args.max_steps:  # after the last step it is finished
                self.saver.stop(result.stop_signals)
                return True
            evaluation_pending = True

    def due(self, every: int | None) -> bool:
        """Return True after the last step, and after one of `every` steps."""
        step = self.progress.step
        return step == self.args.max_steps or (every is not None and step % every == 0)

    def report_bad_step(self, result: StepResult, rows: list[torch.Tensor], micro_batches: list[dict]) -> None:
        """
        Report and record a step that went wrong.

        Raises:
            UserError: after as many in a row as may be. There is a checkpoint from before them, unless that is step 0.
        """
        setup, step, bad_steps = self.setup, self.progress.step, self.bad_steps
        if bad_steps.verdict == SPIKE:
            suspects = list(range(len(rows)))
        else:
            suspects = suspect_micro_batches(result, self.model, self.optimizer, micro_batches, self.accelerator)
        event = describe_bad_step(step, result, bad_steps, suspects, rows, setup.data, setup.split, self.args.seed)
        self.log.event(event)
        self.log.write(f"warning: {format_event(event)}; more in {EVENTS}")
        if bad_steps.not_finite_in_a_row >= self.args.max_nonfinite_steps:
            folder = self.saver.save_last_good()
            self.writer.wait()
            saved = f"{folder} is from before" if folder else "there is no checkpoint from before"
            raise UserError(
                f"{step - self.saver.last_good.step} steps in a row were left out, the last one: "
                f"{format_event(event)}. {saved}: a lower --learning_rate may help (with --allow_changes "
                "learning_rate), or other data (with --allow_changes data)"
            )


def run(args: TrainArguments, state: PartialState, signals: StopSignals, watchdog: Watchdog) -> bool:
    """Open the setup, the repository and the run folder, and train. Returns True if a signal stopped the run."""
    setup = open_setup(args, state)
    repo_id = open_repository(args, state) if args.push_to_hub else None
    with open_run_folder(setup.output_dir, asdict(args), setup.identity, DEFAULTS, state) as plan:
        for message in plan.messages:
            state.print(f"{setup.output_dir}: {message}")
        is_stopped = False
        if plan.is_finished:
            state.print(
                f"{setup.output_dir} holds a finished run; to train again, delete it or choose another --output_dir"
            )
            if repo_id and state.is_main_process:  # the Hub may have been out of reach
                signals.end_at_once(BEFORE_PUBLISHING)
                publish_run(args, repo_id)
        else:
            is_stopped = build_and_train(setup, plan.checkpoint, repo_id, signals, watchdog)
    # The model first, then the process group. If the group is destroyed while a DDP model still refers to it, gloo's
    # threads and this one can wait for each other for ever.
    setup.accelerator.free_memory()
    setup.accelerator.end_training()
    return is_stopped


def build_and_train(
    setup: Setup, checkpoint: Path | None, repo_id: str | None, signals: StopSignals, watchdog: Watchdog
) -> bool:
    """
    Build the model, resume it if there is a checkpoint, train it to the last step, and write and publish it. Returns
    True if a signal stopped the run.
    """
    args, accelerator, data, output_dir = setup.args, setup.accelerator, setup.data, setup.output_dir
    model, optimizer, num_parameters = build(setup)
    setup = replace(setup, split=fit_into_memory(setup, model))
    set_seed(args.seed, device_specific=True)  # from here on each process has its own dropout
    progress = Progress.of(setup.config, setup.tokens_per_step, sum(num_parameters), data.block_size, accelerator)
    bad_steps = BadSteps(args.skip_loss_spikes, has_scaler=accelerator.scaler is not None)
    position = None
    if checkpoint:
        position = resume(checkpoint, output_dir, asdict(args), setup.identity, model, optimizer, accelerator)
        progress.step, progress.elapsed_before = position.step, position.elapsed_seconds
        bad_steps.load(position.anomalies)
    accelerator.print(summary(setup, num_parameters))
    # Of this process: it knows its own stream alone.
    stream = position.streams[0] if position and is_same_data(position.identity, setup.identity) else None
    batches = data.batches(setup.split, args.seed, progress.step, stream)
    evaluation_pending = position is not None and position.is_due
    card = RunCard(
        args, accelerator, data, setup.config, sum(num_parameters), setup.tokens_per_step, repo_id, setup.task_sources
    )
    with RunLog(
        accelerator, output_dir, progress.step, args.max_steps, args.trackers(), asdict(args), evaluation_pending
    ) as log:
        publisher = None
        if repo_id and args.hub_strategy == "checkpoint":
            publisher = CheckpointPublisher(
                output_dir, repo_id, args.hub_private_repo, card.write_checkpoint, log.write
            )
        write_extras = partial(write_tokenizer, data.tokenizer, setup.config.n_positions)
        writer = CheckpointWriter(
            accelerator, output_dir, model, optimizer, args.save_total_limit, write_extras, publisher
        )
        reports = Reports(setup, model, progress, log)
        saver = Saver(setup, progress, batches, bad_steps, writer, log)
        training = Training(
            setup, model, optimizer, progress, batches, bad_steps, log, reports, writer, saver, signals, watchdog
        )
        with out_of_memory_explained(args, setup.split, progress), writer:
            is_stopped = training.train(evaluation_pending)
    if not is_stopped:
        write_card = partial(
            card.write, step=progress.step, elapsed_seconds=progress.elapsed_seconds, samples=reports.samples
        )
        write_final_model(accelerator, model, data, write_card, output_dir)
        if repo_id and accelerator.is_main_process:
            signals.end_at_once(BEFORE_PUBLISHING)
            if publisher:
                publisher.wait()
            try_to_publish_run(args, repo_id)
    return is_stopped


if __name__ == "__main__":
    run_script(main)
