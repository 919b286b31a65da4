"""Qwen's tokenizer and the text encoders of large language models, in a hundred kilobytes."""

from __future__ import annotations

import json
from functools import cache

import tokenizers
from tokenizers import pre_tokenizers, trainers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TEMPLATE = """system
Describe the image by detailing the color, shape, size, texture, quantity, text, spatial \
relationships of the objects and background:
user
assistant
"""
"""Of Qwen-Image: its words are whole tokens, so that it has the 34 that the pipeline cuts off."""
MARKS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{{ message.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
IDS = dict(bos_token_id=None, eos_token_id=None)
SHAPE = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)


@cache
def _pieces(text: str) -> tuple[dict, list]:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=letters, show_progress=False)
    trained.train_from_iterator([text] * 4, trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def qwen_tokenizer() -> Qwen2Tokenizer:
    vocabulary, merges = _pieces(TEMPLATE)
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, additional_special_tokens=MARKS, chat_template=CHAT
    )


def qwen_vl() -> tuple:
    """Tokenizer and encoder, of 32 channels."""
    tokenizer = qwen_tokenizer()
    text = SHAPE | dict(
        hidden_size=32, num_hidden_layers=2, vocab_size=len(tokenizer),
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        **IDS,
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=32)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return tokenizer, Qwen2_5_VLForConditionalGeneration(config)


def qwen3(layers: int, kind: type = Qwen3ForCausalLM) -> tuple:
    """Tokenizer and encoder, of 16 channels."""
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), head_dim=8, num_hidden_layers=layers, tie_word_embeddings=True,
        **SHAPE, **IDS,
    )  # fmt: skip
    return tokenizer, kind(config)


def mistral() -> tuple:
    """Tokenizer (the processor's needs torchvision) and encoder, of 16 channels; 31 layers, because
    three of them are read.
    """
    tokenizer = qwen_tokenizer()
    text = SHAPE | dict(
        model_type="mistral", vocab_size=len(tokenizer), head_dim=8, num_hidden_layers=31, **IDS
    )  # fmt: skip
    vision = dict(
        model_type="pixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, image_size=32, patch_size=16,
    )  # fmt: skip
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=0)
    return tokenizer, Mistral3ForConditionalGeneration(config)
