"""A data folder as a dataset on the Hub, with a card."""

from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from pretraining.data.data_folder import DATASET_FILE, checksum_problem, read_data_folder
from pretraining.errors import UserError
from pretraining.hub import create_repository, hub_errors_as_user_errors
from pretraining.markdown import table


def push_dataset(folder: Path, repo_id: str, private: bool) -> str:
    """
    Publish a data folder as a dataset on the Hub, with a card, in one commit. Returns its address.

    Raises:
        UserError: if a file is damaged, or the Hub refuses, or cannot be reached. There is no half of it then.
    """
    info = read_data_folder(folder)
    shards = [shard for split in info["splits"].values() for shard in split["shards"]]
    if damaged := [problem for shard in shards if (problem := checksum_problem(folder / shard["file"], shard))]:
        raise UserError(*damaged)
    repo_id = create_repository(repo_id, private, repo_type="dataset")
    dataset_card(info, repo_id).save(folder / "README.md")
    with hub_errors_as_user_errors(repo_id):
        commit = HfApi().upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=["README.md", DATASET_FILE, "tokenizer/*", *(shard["file"] for shard in shards)],
            delete_patterns=["*.arrow"],  # of data that was there before
            commit_message="Packed by gpt2scratch",
        )
    return f"{repo_id}, revision {commit.oid}"


def dataset_card(info: dict, repo_id: str) -> DatasetCard:
    sources = info["source"]
    splits = list(info["splits"])
    card_data = DatasetCardData(
        task_categories=["text-generation"],
        tags=["gpt2scratch", "tokenized"],
        configs=[
            {"config_name": "default", "data_files": [{"split": name, "path": f"{name}/*.arrow"} for name in splits]}
        ],
    )
    tokenizer = info["tokenizer"]
    sections = [
        f"---\n{card_data}\n---",
        f"# {repo_id}",
        f"{' and '.join(source['name'] for source in sources.values())} as token ids, packed into rows of "
        f"{info['block_size']:,} by gpt2scratch: documents one after the other, each followed by the end-of-text "
        f"token (id {tokenizer['eos_token_id']}), cut every {info['block_size']:,} tokens.",
        "```bash\naccelerate launch train_accelerate.py --dataset_name " + repo_id + " --output_dir runs/mine\n```",
        "```python\nfrom datasets import load_dataset\n\n"
        f'rows = load_dataset("{repo_id}", split="train", streaming=True)\nprint(next(iter(rows))["input_ids"])\n```',
        "## Data",
        table(
            ("split", "documents", "bytes of text", "tokens", "rows", "tokens dropped"),
            [
                (name, *(f"{split[key]:,}" for key in "documents bytes tokens rows dropped_tokens".split()))
                for name, split in info["splits"].items()
            ],
        ),
        table(
            ("", "value"),
            [
                *((f"source of {name}", f"{at['name']}, revision {at['revision']}") for name, at in sources.items()),
                ("documents without text, left out", f"{info['documents']['without_text']:,}"),
                ("documents with invalid UTF-8, which became U+FFFD", f"{info['documents']['with_invalid_utf8']:,}"),
                ("tokenizer", f"{tokenizer['vocab_size']:,} tokens, in `tokenizer/`"),
                *((f"`{key}`", value) for key, value in info["settings"].items() if value is not None),
            ],
        ),
        "`dataset.json` has all of this, and the sha256 of every shard, for programs.",
    ]
    return DatasetCard("\n\n".join(sections) + "\n")
