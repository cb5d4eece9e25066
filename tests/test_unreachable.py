"""Trackers and a Hub that cannot be reached: training goes on, and says what was not sent."""

from conftest import TINY, metrics, script, succeed, train
from support.hub_server import Hub


def test_without_a_tracker_training_goes_on_and_says_what_it_has_not_got(data_dir, tmp_path):
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    (output_dir / "training_args.yaml").write_text("{}\n")  # a run that came to nothing
    (output_dir / "tensorboard").write_text("where a folder should be")
    arguments = ("--max_steps", 6, "--eval_steps", 3, "--report_to", "tensorboard")
    result = succeed(train(data_dir, output_dir, *arguments))
    assert "warning: tensorboard failed, the run goes on without it: " in result.stderr
    last = f"tensorboard has nothing of this run; {output_dir / 'metrics.jsonl'} has everything"
    assert result.stderr.splitlines()[-1] == last
    assert [line["step"] for line in metrics(output_dir) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_the_hub_gets_later_what_it_could_not_get(data_dir, tmp_path):
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run", "--config_overrides", TINY, "--max_steps", 2)
    command = ("train_accelerate.py", *flags, "--push_to_hub", "--hub_model_id", "us/model")
    with Hub(token="secret") as hub:
        environment = hub.environment(tmp_path / "me")
    result = succeed(script(*command, **environment))  # the Hub is down
    assert "warning: --push_to_hub us/model failed: " in result.stderr and "Traceback" not in result.stderr
    refused = script(*command, **environment)
    assert refused.returncode == 2 and "error: --push_to_hub us/model failed: " in refused.stderr
    with Hub(token="secret") as hub:
        assert (
            "published as us/model, revision " in succeed(script(*command, **hub.environment(tmp_path / "me"))).stdout
        )
        published = hub.files("us/model", "model")
    assert published["model.safetensors"] == (tmp_path / "run/model.safetensors").read_bytes()
    code = {
        "modeling_gpt2scratch.py",
        "configuration_gpt2scratch.py",
        "document_mask.py",
        "linear_cross_entropy.py",
        "one_dnn.py",
    }
    rest = {"config.json", "generation_config.json", "README.md", "tokenizer.json", "tokenizer_config.json"}
    assert set(published) - {".gitattributes"} == {"model.safetensors", "plots/loss.png", *code, *rest}
