"""How the rows of an optimizer step are divided among processes and micro-batches."""

from dataclasses import dataclass, replace

from pretraining.arguments import UserError
from pretraining.training_arguments import TrainArguments


@dataclass(frozen=True)
class StepSplit:
    """How a global batch is divided."""

    batch_size: int
    gradient_accumulation_steps: int
    num_processes: int
    process_index: int
    num_workers: int

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps * self.num_processes

    def with_batch_size(self, batch_size: int) -> "StepSplit":
        """The same global batch in micro-batches of `batch_size`, which divides that of now."""
        accumulation = self.gradient_accumulation_steps * self.batch_size // batch_size
        return replace(self, batch_size=batch_size, gradient_accumulation_steps=accumulation)


def accumulation_steps(args: TrainArguments, block_size: int, num_processes: int) -> int:
    """
    Micro-batches in an optimizer step.

    Raises:
        UserError: if `--tokens_per_step` is not a multiple of what all processes have at once.
    """
    if not args.tokens_per_step:
        return args.gradient_accumulation_steps or 1
    unit = args.per_device_train_batch_size * block_size * num_processes  # of all processes at once
    steps, rest = divmod(args.tokens_per_step, unit)
    if rest or not steps:
        possible = " or ".join(str(unit * count) for count in (steps, steps + 1) if count)
        rows, odd = divmod(args.tokens_per_step, block_size)
        fitting = [str(count) for count in range(1, 2 * num_processes + 1) if not odd and rows % count == 0]
        raise UserError(
            f"--tokens_per_step {args.tokens_per_step} is not a multiple of {unit} (block {block_size} x batch "
            f"{args.per_device_train_batch_size} x {num_processes} processes); nearest: {possible}"
            + (f"; its {rows} rows can be split over {', '.join(fitting)} processes" if fitting else "")
        )
    return steps
