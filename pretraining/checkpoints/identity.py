"""What makes a run this one and no other, and what differs between a checkpoint's and the one that goes on from it."""

from transformers import PreTrainedConfig

from pretraining.cli import format_settings

# What may be changed in the middle of a run, where --allow_changes names it. The rest would make no sense of the
# weights, the optimizer's state or the position in the data.
CHANGEABLE = """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps max_steps weight_decay
    max_grad_norm skip_loss_spikes resid_pdrop embd_pdrop attn_pdrop attn_implementation mixed_precision
    data""".split()
# Entries of the config that decide what the model computes.
ARCHITECTURE = """vocab_size n_positions n_embd n_layer n_head n_inner activation_function resid_pdrop embd_pdrop
    attn_pdrop layer_norm_epsilon qkv_bias tie_word_embeddings""".split()
# And the initial weights, which checkpoints of earlier versions do not tell.
INITIAL = ["initializer_range", "zero_init_residual"]


PARTS = ("settings", "config", "data", "binding")  # of an identity, each a dictionary


def identity(
    settings: dict, config: PreTrainedConfig, tokenizer: str, data: dict[str, str], binding: dict, tokens_per_step: int
) -> dict:
    """
    As JSON, saved with each checkpoint.

    Args:
        settings: the flags that decide the result.
        tokenizer: its fingerprint.
        data: `name` and `fingerprint`.
        binding: what else the position in the data is bound to: of a stream, the numbers of processes and workers.
    """
    return {
        "settings": settings,
        "config": {name: getattr(config, name) for name in ARCHITECTURE + INITIAL},
        "tokenizer": tokenizer,
        "data": data,
        "binding": binding,
        "tokens_per_step": tokens_per_step,
    }


def differences(
    before: dict, now: dict, allowed: list[str], defaults: dict | None = None, is_finished: bool = False
) -> list[str]:
    """
    What speaks against going on: a line for each field that differs, with both values.

    Args:
        before, now: as `identity` made them, `before` read from a file that may be of another version.
        allowed: names of CHANGEABLE that may differ.
        defaults: of the settings; a flag that the version before did not have was at its default.
        is_finished: nothing of the run can be changed any more.
    """
    changeable = [] if is_finished else CHANGEABLE
    found = []
    parts = {name: part if isinstance(part, dict) else {} for name, part in before.items() if name in PARTS}
    before = {**before, **parts}
    before["settings"] = {**(defaults or {}), **before.get("settings", {})}
    for part, what in (("settings", "--{}"), ("config", "a model of {}")):
        for key, value in now[part].items():
            old = before.get(part, {}).get(key)
            if key in INITIAL and key not in before.get(part, {}):
                continue
            if old != value and key not in allowed:
                hint = f", or go on all the same with --allow_changes {key}" if key in changeable else ""
                field = what.format(key)
                found.append(f"{field} {_shown(old)}, not {_shown(value)}: choose another --output_dir{hint}")
    if before.get("tokenizer") != now["tokenizer"]:
        old, new = str(before.get("tokenizer"))[:16], now["tokenizer"][:16]
        found.append(f"another tokenizer: of the fingerprint {old}..., not {new}...")
    if is_same_data(before, now):
        for key, value in now["binding"].items():
            old = before.get("binding", {}).get(key)
            if old != value:
                found.append(f"a stream with {key} {_shown(old)}, not {value}: it has to stay")
    elif "data" not in allowed:
        old, new = before.get("data", {}), now["data"]
        names = f"on {old.get('name')}, not on {new['name']}"
        if old.get("name") == new["name"]:
            names += ", prepared in another way"
        hint = ": go on all the same with --allow_changes data" if "data" in changeable else ""
        found.append(f"other data: {names}{hint}")
    old, new = before.get("tokens_per_step"), now["tokens_per_step"]
    if old != new:
        found.append(f"{_shown(old)} tokens per step, not {new}: --tokens_per_step {old} keeps it")
    return found


def is_same_data(before: dict, now: dict) -> bool:
    """Whether a position in the data of one run means the same in that of the other."""
    return before.get("data", {}).get("fingerprint") == now["data"]["fingerprint"]


def _shown(value: object) -> str:
    return "(not given)" if value in (None, {}) else format_settings(value)
