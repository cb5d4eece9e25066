"""generate.py: the texts of transformers' `generate`, from prompts of all kinds, and in a session at a terminal."""

import contextlib
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
import torch
from conftest import REPOSITORY, run, script, succeed
from support import processes
from support.generated_items import TEXT
from support.tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

import generate
from pretraining.cli import run_script
from pretraining.errors import UserError
from pretraining.tokenization.tokenizer import train_tokenizer

POSITIONS = 64
PROMPTS = ["def wrap(text", "", "The text is wrapped, and"]
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), POSITIONS)


def write_model(folder: Path, n_positions: int, vocab_size: int = 400) -> Path:
    tokenizer = train_tokenizer([TEXT], vocab_size=400)
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
    model = tiny_model(vocab_size=vocab_size, n_positions=n_positions, **shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write(folder, tmp_path, monkeypatch):
    """Call `write(*flags)`: the lines of the output file, of generate.py in this process."""

    def call(*flags: object, model: Path = folder) -> list[dict]:
        path = tmp_path / "texts.jsonl"
        words = ["generate.py", "--model_name_or_path", model, *flags, "--output_file", path]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        generate.main()
        return [json.loads(line) for line in path.read_text().splitlines()]

    return call


def reference(folder: Path, prompt: str | list[int], seed: int = 42, **settings) -> list[list[int]]:
    """New tokens by `generate` of transformers, with its own names for everything."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    token_ids = tokenizer(prompt).input_ids or [tokenizer.bos_token_id] if isinstance(prompt, str) else prompt
    input_ids = torch.tensor([token_ids])
    set_seed(seed)
    settings = {"max_new_tokens": 20, "pad_token_id": 0, "tokenizer": tokenizer, **settings}
    return model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **settings)[
        :, len(token_ids) :
    ].tolist()


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ([], SAMPLED),
        (["--seed", 7], {**SAMPLED, "seed": 7}),
        (["--temperature", 0], {"do_sample": False}),
        (["--temperature", 1.5, "--top_k", 0, "--top_p", 1], {"do_sample": True, "temperature": 1.5, "top_k": 0}),
        (["--top_k", 3, "--repetition_penalty", 1.3], {**SAMPLED, "top_k": 3, "repetition_penalty": 1.3}),
        (["--top_p", 0.5], {**SAMPLED, "top_p": 0.5}),
        (["--num_return_sequences", 3], {**SAMPLED, "num_return_sequences": 3}),
        (["--num_beams", 3], {"do_sample": False, "num_beams": 3}),
        (
            ["--num_beams", 3, "--num_return_sequences", 2, "--temperature", 0.8],
            {**SAMPLED, "num_beams": 3, "num_return_sequences": 2},
        ),
    ],
)
def test_texts_are_token_for_token_those_of_transformers(flags, settings, folder, write):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = reference(folder, PROMPTS[0], **settings)
    lines = write("--prompt", PROMPTS[0], "--max_new_tokens", 20, *flags)
    assert len(lines) == len(expected)
    for line, token_ids in zip(lines, expected, strict=True):
        is_ended = tokenizer.eos_token_id in token_ids
        kept = token_ids[: token_ids.index(tokenizer.eos_token_id)] if is_ended else token_ids
        assert line["prompt"] == PROMPTS[0] and line["generated_text"] == tokenizer.decode(kept)
        assert line["num_new_tokens"] == len(kept) + is_ended
        assert line["finish_reason"] == ("end_of_text" if is_ended else "max_new_tokens")


def test_printed_texts_are_the_same_streamed_or_not(folder, write):
    (line,) = write("--prompt", PROMPTS[0], "--max_new_tokens", 20)
    flags = ("--model_name_or_path", folder, "--prompt", PROMPTS[0], "--max_new_tokens", 20)
    result = succeed(script("generate.py", *flags))
    assert result.stdout == as_read(f"{line['prompt']}{line['generated_text']}\n")
    both = write("--prompt", PROMPTS[0], "--max_new_tokens", 20, "--num_return_sequences", 2)
    result = succeed(script("generate.py", *flags, "--num_return_sequences", 2))
    assert result.stdout == as_read("\n---\n".join(each["prompt"] + each["generated_text"] for each in both) + "\n")


def as_read(text: str) -> str:
    """Python reads all ends of lines as one, and a random model writes all kinds."""
    return io.StringIO(text, newline=None).read()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_prompts_of_any_length_share_a_batch(batch_size, folder, write):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [*PROMPTS, "x" * 60]  # the last one has room for less
    lines = write("--prompt", *prompts, "--temperature", 0, "--per_device_eval_batch_size", batch_size)
    room = POSITIONS - len(tokenizer(prompts[-1]).input_ids)
    assert [line["prompt"] for line in lines] == prompts and lines[-1]["num_new_tokens"] == room
    for line in lines:
        used = len(tokenizer(line["prompt"]).input_ids) or 1
        (expected,) = reference(folder, line["prompt"], do_sample=False, max_new_tokens=POSITIONS - used)
        assert line["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_text_ends_at_the_model_s_last_position_and_says_so(folder, write, capfd):
    lines = write("--prompt", PROMPTS[2], "--temperature", 0)
    used = len(AutoTokenizer.from_pretrained(folder)(PROMPTS[2]).input_ids)
    assert (lines[0]["num_new_tokens"], lines[0]["finish_reason"]) == (POSITIONS - used, "last_position")
    assert "1 of 1 texts end where the model's 64 positions are full" in capfd.readouterr().err


def test_a_text_ends_where_the_model_ends_it_or_behind_a_stop_string(folder, tmp_path, write):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (token_ids,) = reference(folder, PROMPTS[0], **SAMPLED)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config = GenerationConfig(eos_token_id=[0, token_ids[5]])
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    end = token_ids.index(token_ids[5])
    (line,) = write("--prompt", PROMPTS[0], "--max_new_tokens", 20, model=tmp_path / "other")
    assert (line["num_new_tokens"], line["finish_reason"]) == (end + 1, "end_of_text")
    assert line["generated_text"] == tokenizer.decode(token_ids[:end])

    stop = next(text for text in map(tokenizer.decode, token_ids[3:]) if text.isascii() and text.isprintable())
    (expected,) = reference(folder, PROMPTS[0], **SAMPLED, stop_strings=[stop, "never"])
    (line,) = write("--prompt", PROMPTS[0], "--max_new_tokens", 20, "--stop_strings", "never", stop)
    assert line["generated_text"] == tokenizer.decode(expected) and stop in line["generated_text"]
    assert (line["num_new_tokens"], line["finish_reason"]) == (len(expected), "stop_string") and len(expected) < 20

    # One that begins in the prompt; the other prompts of the batch go on, behind which it has padding.
    starts = {f"def {word}": reference(folder, f"def {word}", do_sample=False)[0][0] for word in "abcdefghijklm"}
    prompt, first = next((text, word) for text, word in starts.items() if tokenizer.decode([word]).isalnum())
    stop = prompt[-2:] + tokenizer.decode([first])
    flags = ("--max_new_tokens", 20, "--temperature", 0, "--stop_strings", stop)
    line, *others = write("--prompt", prompt, *PROMPTS[1:], *flags)
    assert (line["generated_text"], line["num_new_tokens"]) == (tokenizer.decode([first]), 1)
    assert line["finish_reason"] == "stop_string"
    assert [other["finish_reason"] for other in others] == ["max_new_tokens"] * 2


def test_a_prompt_that_is_too_long_is_refused_or_cut(folder, write, refuse, capfd):
    prompt = "wrap " * 90
    token_ids = AutoTokenizer.from_pretrained(folder)(prompt).input_ids
    assert len(token_ids) >= POSITIONS
    (line,) = refuse(generate, "--model_name_or_path", folder, "--prompt", prompt)
    assert line == (
        f"generate.py: error: the prompt 'wrap wrap wrap wrap wrap wrap wrap [...]' has {len(token_ids)} tokens, "
        "which leave no room in the model's 64 positions: make it shorter, or give --truncate"
    )
    for max_new_tokens, kept in ((10, 54), (200, 32)):
        flags = ("--prompt", prompt, "--truncate", "--max_new_tokens", max_new_tokens, "--temperature", 0)
        (line,) = write(*flags)
        (expected,) = reference(folder, token_ids[-kept:], do_sample=False, max_new_tokens=POSITIONS - kept)
        assert line["num_new_tokens"] == len(expected) == POSITIONS - kept
        assert f"has {len(token_ids)} tokens: only the last {kept} are used" in capfd.readouterr().err


def test_prompts_come_from_files_and_standard_input(folder, tmp_path, write, monkeypatch):
    flags = ("--max_new_tokens", 4)
    for mark, newline in (("", "\n"), ("\ufeff", "\r\n")):  # as on Linux, and as Windows may write it
        content = f"{mark}{PROMPTS[0]}{newline}{newline}{PROMPTS[2]}{newline}"
        (tmp_path / "prompts.txt").write_bytes(content.encode())
        lines = write(*flags, "--prompt_file", tmp_path / "prompts.txt")
        assert [line["prompt"] for line in lines] == [PROMPTS[0], PROMPTS[2]]
    texts = ["a\nb", "", "c\u2028d"]
    records = [json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts]
    (tmp_path / "prompts.jsonl").write_text("".join(records))
    lines = write(*flags, "--prompt_file", tmp_path / "prompts.jsonl")
    assert [line["prompt"] for line in lines] == texts
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f():\n    pass\n"))
    (line,) = write(*flags)
    assert line["prompt"] == "def f():\n    pass"


def test_mistakes_are_told_in_one_line_each(folder, tmp_path, refuse, monkeypatch):
    flags = ("--prompt", "x", "--prompt_file", "y", "--temperature", -1, "--top_p", 0, "--top_k", -1)
    flags += (
        "--seed",
        1 << 32,
        "--num_beams",
        2,
        "--num_return_sequences",
        3,
        "--stop_strings",
        "",
        "--output_file",
        tmp_path,
    )
    lines = refuse(generate, *flags)
    assert [line.split(": ")[2].split()[0] for line in lines] == [
        "--model_name_or_path",
        "--prompt",
        "--top_k",
        "--seed",
        "--temperature",
        "--top_p",
        "--stop_strings",
        "--num_return_sequences",
        "--output_file",
    ]
    model = ("--model_name_or_path", folder)
    (line,) = refuse(generate, *model, "--prompt", "x", "--num_return_sequences", 2, "--temperature", 0)
    assert line.endswith("would be the same text each time: give a --temperature above 0, or --num_beams")
    (line,) = refuse(generate, *model, "--prompt_file", tmp_path / "gone.txt")
    assert line.endswith("gone.txt cannot be read: No such file or directory")
    (tmp_path / "empty.txt").write_text("\n")
    (line,) = refuse(generate, *model, "--prompt_file", tmp_path / "empty.txt")
    assert line.endswith("empty.txt has no prompts")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "x"}\nx\n')
    lines = refuse(generate, *model, "--prompt_file", tmp_path / "bad.jsonl")
    assert [line.split("bad.jsonl ")[1] for line in lines] == [
        "line 2: is not a JSON object with a text as its `prompt`",
        "line 3: is not a JSON object",
    ]
    (line,) = refuse(generate, "--model_name_or_path", tmp_path, "--prompt", "x")
    assert "cannot be loaded" in line
    (line,) = refuse(generate, *model, "--prompt", "x", "--max_new_tokens", 2, "--output_file", "/proc/texts.jsonl")
    assert "--output_file /proc/texts.jsonl cannot be written: " in line
    (line,) = refuse(generate, *model, "--prompt", "a\udcff")
    assert line.endswith("the prompt 'a\\udcff' is not valid Unicode")
    write_model(tmp_path / "small", POSITIONS, vocab_size=200)
    (line,) = refuse(generate, "--model_name_or_path", tmp_path / "small", "--prompt", "wrapped")
    assert "the tokenizer gave token " in line and line.endswith("but the model has only 200")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (line,) = refuse(generate, *model, "--prompt", "x")
    assert "generate.py is one process" in line


def heed_interrupts() -> None:
    """Undo what a shell does to tests that run in the background: their processes ignore interrupts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_what_is_written_before_an_interrupt_is_kept(tmp_path):
    folder, path = write_model(tmp_path / "model", 2048), tmp_path / "texts.jsonl"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"def number{number}\n" for number in range(300)))
    flags = ("--prompt_file", prompts, "--output_file", path, "--per_device_eval_batch_size", 1)
    running = processes.start("generate.py", "--model_name_or_path", folder, *flags, fault=heed_interrupts)
    processes.wait_until(lambda: re.search(r" ([3-9]|\d\d)/300 ", running.output("stderr")), 120)
    os.kill(running.pid, signal.SIGINT)
    result = running.wait()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert result.returncode == 130 and 3 <= len(lines) < 300
    assert [line["prompt"] for line in lines] == [f"def number{number}" for number in range(len(lines))]
    assert f"{path}: texts of {len(lines)} of 300 prompts" in result.stderr
    assert result.stderr.splitlines()[-1] == "generate.py: interrupted"


def test_rotary_frequencies_stay_in_fp32_whatever_the_precision(tmp_path, monkeypatch):
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=400, **config))
    model.save_pretrained(tmp_path)
    train_tokenizer([TEXT], vocab_size=400).save_pretrained(tmp_path)
    args = generate.GenerateArguments(model_name_or_path=str(tmp_path))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    model = generate.open_writer(args).model
    assert (model.dtype, model.model.rotary_emb.inv_freq.dtype) == (torch.bfloat16, torch.float32)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="texts cannot be written in fp8"):
        generate.open_writer(args)


def test_padding_is_a_token_that_the_model_has(folder, tmp_path, write):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<|stop|>"]})
    shutil.copytree(folder, tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    assert tokenizer.pad_token_id == 400
    lines = write("--prompt", *PROMPTS, "--max_new_tokens", 5, model=tmp_path / "padded")
    assert [line["prompt"] for line in lines] == PROMPTS


def test_a_broken_pipe_of_something_else_is_an_error():
    def main() -> None:
        raise BrokenPipeError(32, "of a socket")

    with (
        open(os.devnull, "w") as output,
        contextlib.redirect_stdout(output),
        pytest.raises(BrokenPipeError, match="of a socket"),
    ):
        run_script(main)


def test_who_reads_the_output_may_stop(folder):
    words = [sys.executable, str(REPOSITORY / "generate.py"), "--model_name_or_path", str(folder), "--prompt", "def "]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_a_session_at_a_terminal(tmp_path):
    folder = write_model(tmp_path, 8192)
    words = [str(REPOSITORY / "generate.py"), "--model_name_or_path", str(folder), "--max_new_tokens", "8000"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TERM": "dumb"}
    settings = {"timeout": 60, "env": environment, "dimensions": (50, 300), "preexec_fn": heed_interrupts}
    terminal = pexpect.spawn(sys.executable, words, encoding="utf-8", **settings)
    terminal.expect_exact("Type the beginning of a text. /help tells more, Ctrl-D ends.")
    for typed, answer in (
        ("/help", "/set temperature 0.5"),
        ("/set top_q 1", "there is no setting 'top_q', did you mean top_p?"),
        ("/set top_k 0.5", "top_k must be a whole number, got '0.5'"),
        ("/set top_k 3", "3"),
        ("/set top_k none", "none"),
        ("/set temperature -1", "temperature must be a finite number of at least 0, got -1.0"),
        ("/set temperature", "a setting has a name and a value: /set temperature 0.5"),
        ("/sing", "there is no /sing: /help shows what there is"),
        ("/set temperature 0.5", "0.5"),
        ("/show", "temperature 0.5"),
    ):
        terminal.expect_exact("> ")
        terminal.sendline(typed)
        terminal.expect_exact(answer)
    for prompt in (PROMPTS[0], "\x1b[A"):  # typed, and then brought back by the arrow key
        terminal.expect_exact("> ")
        terminal.sendline(prompt)
        terminal.expect_exact(PROMPTS[0])  # as it is typed, and as the text begins
        terminal.expect_exact(PROMPTS[0])
        terminal.expect("[a-z]{3}")  # it streams, as the text would take minutes
        terminal.sendintr()
        terminal.expect_exact("[stopped]")
    terminal.expect_exact("> ")
    terminal.send("half a line")
    terminal.sendintr()
    terminal.expect_exact("> ")
    terminal.sendline("/set max_new_tokens 5")
    terminal.expect_exact("> ")
    texts = []
    for _ in range(2):
        terminal.sendline("/set seed 3")
        terminal.expect_exact("> ")
        terminal.sendline("The")
        terminal.expect_exact("> ")
        texts.append(terminal.before)
    assert texts[0] == texts[1]
    terminal.sendline("/set num_return_sequences 2")
    terminal.expect_exact("> ")
    terminal.sendline("")
    terminal.expect_exact("---")
    terminal.expect_exact("> ")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def test_imports_are_spared_what_is_not_needed(folder):
    """Only of a program that begins with generate.py: another, as this one, keeps its collector and SciPy."""
    program = "import gc, sys, generate; print(gc.isenabled(), 'scipy' in sys.modules, gc.get_freeze_count() > 0)"
    assert succeed(run(sys.executable, "-c", program, PYTHONPATH=str(REPOSITORY))).stdout == "True False True\n"
    assert gc.isenabled() and sys.modules.get("scipy", "not imported") is not None
