"""Config and tokenizer of the paper's models as folders without weights: real sizes, chat templates of their shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import tiny_tokenizer

# What their published config.json says.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}
# A begin-of-text token and a system turn that always exists; turns without BOS and a default system prompt.
TEMPLATES = {
    "llama": (
        "{{ bos_token }}<|system|>\n\nCutting Knowledge Date: December 2023\n\n"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
        "{{ eos_token }}{% for message in messages %}<|{{ message.role }}|>\n\n{{ message.content | trim }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
    ),
    "qwen2": (
        "{% if messages[0].role != 'system' %}<|system|>\nYou are Qwen. You are a helpful assistant.{{ eos_token }}\n"
        "{% endif %}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}


def save_model_text(folder: Path, family: str) -> None:
    """Write a folder with config and tokenizer, as a hub download without weights is."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[family], indent=1))
    tiny_tokenizer(TEMPLATES[family]).save_pretrained(folder)
