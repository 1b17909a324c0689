"""Tiny models of images and text with random weights, as checkpoints with a tokenizer of letters.

clip      CLIPModel; CLIP's byte-pair tokenizer with two merges
siglip    SiglipModel; the Gemma tokenizer of SigLIP 2, whose vocabulary is made here
"""

from pathlib import Path

import transformers
from tiny_models import randomized

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
LETTERS = [chr(code) for code in range(33, 127)]


def write_clip(folder: Path) -> str:
    """The checkpoint of a tiny CLIP; its name."""
    symbols = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "ca", "cat</w>"]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary |= {start: len(vocabulary), end: len(vocabulary) + 1}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[("c", "a"), ("ca", "t</w>")])
    text = {
        **TEXT,
        "vocab_size": len(vocabulary),
        "bos_token_id": vocabulary[start],
        "eos_token_id": vocabulary[end],
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return _write(folder, transformers.CLIPModel(config), tokenizer)


def write_siglip(folder: Path) -> str:
    """The checkpoint of a tiny SigLIP; its name."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    bytes_ = [f"<0x{code:02X}>" for code in range(256)]
    vocabulary = {symbol: number for number, symbol in enumerate([*special, *bytes_, *LETTERS])}
    tokenizer = transformers.GemmaTokenizer(
        vocab=vocabulary, merges=[], add_bos_token=False, add_eos_token=True
    )
    text = {
        **TEXT,
        "vocab_size": len(vocabulary),
        "projection_size": 32,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    return _write(folder, transformers.SiglipModel(config), tokenizer)


def _write(folder: Path, model: transformers.PreTrainedModel, tokenizer: object) -> str:
    # Numbers from which nothing is learned, but for the scale: log 100 would hide small errors.
    randomized(model)
    model.logit_scale.data.fill_(2.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return str(folder)
