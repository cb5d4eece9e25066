"""
Measure the time from the start of the process to the end of the first training step, on prepared data.

    python benchmarks/start_up.py                                                       # on data/demo

train_accelerate.py, and a script in the manner of transformers' run_clm.py: the same rows as a dataset saved by
`datasets`, its own argument parser, GPT2LMHeadModel of the same shape, and Trainer. In turns, each a process; the time
is taken when its first step is in its log.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from pretraining.cli import flag, parse_arguments, run_script
from pretraining.markdown import table

SCRIPT = Path(__file__).resolve().parent.parent / "train_accelerate.py"
OURS, RUN_CLM = "train_accelerate.py", "a script like run_clm.py"
SHAPE = {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 256}
ROWS = 16  # of a step


@dataclass
class BenchmarkArguments:
    data_dir: str = flag("data/demo", "a data folder made by prepare_data.py")
    mixed_precision: side_by_side.MixedPrecision = flag(None, side_by_side.PRECISION_HELP)
    rounds: int = flag(7, "processes of each")
    measure: str = flag(None, "measure this one")
    saved: str = flag(None, "the rows, as `datasets` saves them; made and used by this script itself")


def run_clm(saved: str, output_dir: str, *flags: str) -> None:
    """
    The whole of the other script: it is run as `start_up.py SAVED OUTPUT_DIR`, with flags of Trainer's, and writes the
    file `step` after its first step.
    """
    from datasets import load_from_disk
    from transformers import (
        AutoTokenizer,
        GPT2Config,
        GPT2LMHeadModel,
        HfArgumentParser,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        default_data_collator,
        set_seed,
    )

    class FirstStep(TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            Path(output_dir, "step").touch()

    words = ["--output_dir", output_dir, "--max_steps", "2", "--report_to", "none", *flags]
    words += ["--per_device_train_batch_size", str(ROWS), "--save_strategy", "no"]
    (training_args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words)
    set_seed(training_args.seed)
    rows = load_from_disk(saved)
    tokenizer = AutoTokenizer.from_pretrained(Path(saved) / "tokenizer")
    shape = {**SHAPE, "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None}
    trainer = Trainer(
        model=GPT2LMHeadModel(GPT2Config(**shape)),
        args=training_args,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[FirstStep()],
    )
    trainer.train()


def save_rows(data_dir: str, folder: str) -> None:
    from datasets import Dataset

    from pretraining.data.data_folder import open_data_folder
    from pretraining.tokenization.tokenizer import load_tokenizer

    train = open_data_folder(Path(data_dir)).train
    rows = train.__getitems__(list(range(len(train)))).long().tolist()
    Dataset.from_dict({"input_ids": rows, "labels": rows}).save_to_disk(folder)
    load_tokenizer(Path(data_dir) / "tokenizer").save_pretrained(Path(folder) / "tokenizer")


def measure(args: BenchmarkArguments) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        if args.measure == OURS:
            overrides = ",".join(f"{name}={value}" for name, value in SHAPE.items())
            flags = {"data_dir": args.data_dir, "output_dir": folder, "config_overrides": overrides, "max_steps": 2}
            flags |= {"per_device_train_batch_size": ROWS, "eval_iters": 1, "report_to": "none"}
            command = [SCRIPT, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
            log = Path(folder) / "metrics.jsonl"
        else:
            command, log = [__file__, args.saved, folder], Path(folder) / "step"
            command += [] if args.mixed_precision == "no" else [f"--{args.mixed_precision}"]
            command += ["--use_cpu"] if side_by_side.device().type == "cpu" else []
        environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": args.mixed_precision, "HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            while not (log.exists() and (log.name == "step" or log.stat().st_size)):
                if process.poll() is not None:
                    raise RuntimeError(f"{args.measure} ended before its first step")
                time.sleep(0.01)
            seconds = time.perf_counter() - started
            peak = int(Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
            process.kill()
    return {"seconds": seconds, "megabytes": peak}


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    args.mixed_precision = side_by_side.precision(args.mixed_precision)
    if args.measure:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_rows(args.data_dir, folder)
        flags = ["--data_dir", args.data_dir, "--saved", folder, "--mixed_precision", args.mixed_precision]
        side_by_side.in_turns(__file__, (OURS, RUN_CLM), 1, *flags)  # which reads the files into memory
        measured = side_by_side.in_turns(__file__, (OURS, RUN_CLM), args.rounds, *flags)
    header = ["", "seconds to the end of the first step", "peak MB by then"]
    faster = side_by_side.ratio(measured, RUN_CLM, OURS, "seconds")
    print(
        side_by_side.section(
            ("torch", "transformers", "accelerate", "datasets"),
            f"{', '.join(f'{name} {value}' for name, value in SHAPE.items())}, {ROWS} rows, "
            f"{side_by_side.precision_name(args.mixed_precision)}, medians of {args.rounds} rounds",
            table(header, side_by_side.medians(measured, {"seconds": ".2f", "megabytes": ",.0f"})),
            f"Ours is {faster:.2f} times as fast.",
        )
    )


if __name__ == "__main__":
    if len(sys.argv) > 2 and not sys.argv[1].startswith("--"):
        run_clm(*sys.argv[1:])
    else:
        run_script(main)
