"""What a run reports while it trains: loss and speed, evaluations, HellaSwag and samples."""

import copy
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from pretraining.distributed.processes import is_sharded
from pretraining.errors import UserError
from pretraining.evaluation.hellaswag_scoring import score_on_all_processes, summarise
from pretraining.evaluation.loglikelihood import evaluating
from pretraining.evaluation.samples import write_samples
from pretraining.evaluation.validation import evaluate
from pretraining.hardware import generator_states, restore_generators
from pretraining.records.plots import plot_hellaswag, plot_loss, plot_tasks
from pretraining.records.progress import Progress, duration
from pretraining.records.reference_losses import comparable_curve, comparable_losses
from pretraining.records.run_files import HELLASWAG_PLOT, LOSS_PLOT, TASKS_PLOT
from pretraining.records.run_log import RunLog
from pretraining.records.task_results import task_results
from pretraining.training.setup import Setup
from pretraining.training.step import StepResult

if TYPE_CHECKING:
    from pretraining.evaluation.harness_model import TreeLM

# The time to go is estimated once so many steps are behind a run: the first ones warm up, or compile.
STEPS_TO_MEASURE = 5


@dataclass
class Reports:
    """
    Writes lines of metrics.jsonl, plots, and lines for the person at the terminal. All processes have to call its
    methods together.

    Attributes:
        model: as `accelerator.prepare` returned it.
        first_step: the number of steps that were done when the program started.
        samples: the last ones written.
    """

    setup: Setup
    model: nn.Module
    progress: Progress
    log: RunLog
    samples: list[str] = field(default_factory=list)
    is_measured: bool = False

    def __post_init__(self) -> None:
        self.first_step = self.progress.step

    def training(self, result: StepResult, learning_rate: float) -> None:
        """Report the step's loss and gradient norm, and the speed since the last report, evaluation or checkpoint."""
        progress, max_steps = self.progress, self.setup.args.max_steps
        loss, speed = result.loss, progress.speed()
        values = {"loss": loss, "learning_rate": learning_rate, "grad_norm": result.grad_norm, **speed}
        self.log.metrics(progress, values)
        shown = {"loss": f"{loss:.3f}", "tokens/s": f"{speed['tokens_per_second']:,.0f}"}
        mfu = {"MFU": f"{speed['mfu']:.1%}"} if "mfu" in speed else {}
        self.log.show_progress(progress.step, **shown, **mfu)
        if progress.step == 1 and not self.setup.args.model_name_or_path:
            self._warn_of_unusual_first_loss(loss)
        if not self.is_measured and self.first_step + STEPS_TO_MEASURE <= progress.step < max_steps:
            hours = (max_steps - progress.step) * speed["step_seconds"] / 3600
            self.log.write(f"{shown['tokens/s']} tokens/s: about {duration(hours)} to go, evaluations not counted")
            self.is_measured = True

    def evaluation(self) -> None:
        """
        Evaluate on the validation rows, and draw the plot of losses.

        Raises:
            UserError: if the loss is not finite.
        """
        setup, progress, validation = self.setup, self.progress, self.setup.data.validation
        eval_iters, batch_size = setup.args.eval_iters, setup.split.batch_size
        num_rows = eval_iters and eval_iters * progress.tokens_per_step // setup.data.block_size
        values = evaluate(self.model, validation, setup.accelerator, batch_size, num_rows, setup.model_inputs)
        if not math.isfinite(values["eval_loss"]):
            raise UserError(
                f"the evaluation loss after step {progress.step} is {values['eval_loss']}: "
                "a lower --learning_rate may help"
            )
        self.log.metrics(progress, values)
        figures = ", ".join(f"{key} {value:.4f}" for key, value in values.items())
        self.log.write(f"step {progress.step}: {figures}")
        if setup.accelerator.is_main_process:
            nats = math.log(2) * validation.bytes_per_token
            references = {name: rate * nats for name, rate in validation.compression_rates.items()}
            names = [source["name"] for source in setup.data.sources]
            references |= comparable_losses(names, setup.data.tokenizer)
            curve = comparable_curve(names, setup.data.tokenizer)
            self._draw(LOSS_PLOT, lambda: plot_loss(setup.output_dir, references, curve))
        progress.restart_interval()

    def hellaswag(self) -> None:
        """Score the model on HellaSwag, and draw its plot."""
        setup, items = self.setup, self.setup.hellaswag
        items_at_once = max(1, setup.split.batch_size // 4)  # an item is four rows
        scores = score_on_all_processes(setup.accelerator, self._plain_model(), items, items_at_once)
        if setup.accelerator.is_main_process:
            summary = summarise(items, scores, "completion")
            values = {f"hellaswag_{key}": value for key, value in summary.items() if isinstance(value, int | float)}
            self.log.metrics(self.progress, values)
            self.log.write(
                f"step {self.progress.step}: HellaSwag acc {values['hellaswag_acc']:.4f}, "
                f"acc_norm {values['hellaswag_acc_norm']:.4f} of {values['hellaswag_n']:,} items"
            )
            self._draw(HELLASWAG_PLOT, lambda: plot_hellaswag(setup.output_dir))
        self.progress.restart_interval()

    def tasks(self) -> None:
        """Evaluate on tasks of lm-evaluation-harness, and draw their plot."""
        from pretraining.evaluation.harness import FigureError, metrics_of, run_tasks

        setup, sources = self.setup, self.setup.task_sources
        assert setup.tasks is not None
        before = generator_states(setup.accelerator.device)
        try:
            results = run_tasks(self._harness_model, setup.tasks, setup.args.eval_tasks_limit)
        except FigureError as error:  # on all processes
            self.log.write(f"warning: step {self.progress.step}: {error}")
            self.progress.restart_interval()
            return
        finally:
            restore_generators(before, setup.accelerator.device)  # a task may generate text
        if setup.accelerator.is_main_process:
            values = metrics_of(results)
            num_items = {f"{each.source.task}_n": each.source.num_items for each in task_results(sources, values)}
            num_items["eval_tasks_n"] = sum(counts["effective"] for counts in results["n-samples"].values())
            self.log.metrics(self.progress, values | num_items)
            figures = ", ".join(f"{key} {value:.4f}" for key, value in values.items() if not key.endswith("_stderr"))
            self.log.write(f"step {self.progress.step}: {figures}")
            self._draw(TASKS_PLOT, lambda: plot_tasks(setup.output_dir, sources))
        self.progress.restart_interval()

    @cached_property
    def _harness_model(self) -> "TreeLM":
        from pretraining.evaluation.harness_model import TreeLM

        setup, model = self.setup, self._plain_model()
        tokenizer = copy.deepcopy(setup.data.tokenizer)  # which the harness gives a padding token
        with evaluating(model):
            return TreeLM(
                model,
                accelerator=setup.accelerator,
                progress=False,
                tokenizer=tokenizer,
                batch_size=setup.split.batch_size,
            )

    def sample(self) -> None:
        """Write samples of text."""
        args, accelerator = self.setup.args, self.setup.accelerator
        sharded = is_sharded(accelerator)
        if sharded or accelerator.is_main_process:
            model, tokenizer = self._plain_model(), self.setup.data.tokenizer
            self.samples = write_samples(model, tokenizer, args.sample_prompts, args.seed, sharded)
        for sample in self.samples:
            self.log.write(f"--- sample at step {self.progress.step}\n{sample}\n---")
        self.progress.restart_interval()

    def _draw(self, name: str, plot: Callable[[], None]) -> None:
        self.log.attempt(name, plot)
        # The parts of a figure refer to each other, 1.6 MB of them. By itself Python looks for such circles less and
        # less often in a process with many objects, and a long run grew by 60 MB.
        gc.collect()

    def _warn_of_unusual_first_loss(self, loss: float) -> None:
        """Warn if the loss of an untrained model is not that of equal chances for all tokens, ln(vocabulary)."""
        expected = math.log(self.setup.config.vocab_size)
        if abs(loss - expected) > 0.1 * expected:
            self.log.write(
                f"warning: the first loss is {loss:.2f}, but should be about ln(vocabulary) = {expected:.2f} in an "
                "untrained model: its initial weights are of an unusual size"
            )

    def _plain_model(self) -> PreTrainedModel:
        """Return the model that is not compiled: each length of input would be compiled anew."""
        return self.setup.accelerator.unwrap_model(self.model, keep_torch_compile=False)
