"""A Llama of some thousand parameters with random weights, a tokenizer of whole words and a chat template."""

from __future__ import annotations

from pathlib import Path

from tests.models.tiny_bert import COMMON, WORDS

TEMPLATE = (
    "{% for message in messages %}<start> {{ message['role'] }} {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)
MAX_POSITIONS = 64


def write_tiny_llama(folder: Path, seed: int = 0, *, chat: bool = True, kind: str = "Llama") -> Path:
    """Write config, safetensors and tokenizer into a folder. `kind` is that of the model in transformers."""
    from dist_train.models.text_base import import_transformers

    transformers = import_transformers()
    import tokenizers
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    chat_words = ["system", "user", "assistant", "answer", "how", "really"]
    words = ["<unk>", *chat_words, *COMMON, *WORDS, *(word for own in WORDS.values() for word in own)]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<end>",
        additional_special_tokens=["<start>"],
    )  # fmt: skip
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "Llama":
        sizes |= {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": MAX_POSITIONS}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    return folder
