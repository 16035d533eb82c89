"""Downloads a model from the Hugging Face hub: settings, tokenizer and safetensors, no code."""

from pathlib import Path

from checkpoint.files import one_line
from checkpoint.opened import CheckpointError

FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
         "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
         "model.safetensors", "model-*.safetensors",
         "model.safetensors.index.json", "adapter_config.json"]


def download(repo):
    """A hub id, "org/name" -> the folder with its files, from the hub's cache or the network.

    Raises CheckpointError.
    """
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        return Path(snapshot_download(repo, allow_patterns=FILES))
    except Exception as error:  # many kinds: no network, no such model, no permission, full disk
        raise CheckpointError(
            f"cannot download {repo} from the Hugging Face hub ({one_line(error)}); check the "
            "name and the network, or give --model a local folder") from None
