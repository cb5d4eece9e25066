"""The model split over two processes, by transformers' own machinery and this model's plans, is the same model."""

import json

import pytest
from conftest import REPOSITORY, succeed
from support.processes import run_ranks
from support.tiny_models import randomise, tiny_model

PROGRAM = """
import json, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import torch
import torch.distributed as dist
from support.tiny_models import random_ids
from transformers.distributed import DistributedConfig
from modeling_gpt2scratch import GPT2ScratchForCausalLM

kind = sys.argv[1]
ids = random_ids(2, 12)
whole = GPT2ScratchForCausalLM.from_pretrained("saved")
split = GPT2ScratchForCausalLM.from_pretrained("saved", distributed_config=DistributedConfig(**{f"{kind}_size": 2}))
local = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in split.parameters())
report = {"share": local / whole.num_parameters()}
arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
with torch.no_grad():
    report["logits"] = (split(ids).logits - whole(ids).logits).abs().max().item()
    report["same_text"] = torch.equal(split.generate(ids, **arguments), whole.generate(ids, **arguments))
if kind != "pp":  # transformers' pipeline is for inference
    output, expected = (model.train()(ids, labels=ids) for model in (split, whole))
    output.loss.backward()
    expected.loss.backward()
    report["skipped_logits"] = output.logits is None
    report["loss"] = abs(output.loss.item() - expected.loss.item())
    report["gradients"] = max(
        (getattr(a.grad, "full_tensor", lambda a=a: a.grad)() - b.grad).abs().max().item()
        for a, b in zip(split.parameters(), whole.parameters(), strict=True)
    )
Path(f"report-{dist.get_rank()}.json").write_text(json.dumps(report))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["tp", "pp", "fsdp"])
def test_a_model_on_two_processes_is_the_same_model(kind, tmp_path):
    model = tiny_model(vocab_size=102)
    randomise(model)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "program.py").write_text(PROGRAM)
    for result in run_ranks(2, tmp_path / "program.py", kind, REPOSITORY, REPOSITORY / "tests", cwd=tmp_path):
        succeed(result)
    for rank in (0, 1):
        report = json.loads((tmp_path / f"report-{rank}.json").read_text())
        assert report["share"] < 0.8  # really split
        assert report["logits"] < 1e-5
        assert report["same_text"]
        if kind != "pp":
            assert report["loss"] < 1e-5
            assert report["gradients"] < 1e-5
            # A head that is sharded where the loss is made has to be called; FSDP gathers it before.
            assert report["skipped_logits"] == (kind == "fsdp")
