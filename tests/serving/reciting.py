"""A pair of models that know a conversation by heart, with a call of a tool in it: real forwards, known texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from chat_support import ADD, QUESTION, THINKING, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

END = "<end>"
THOUGHT = "I have a tool for that."
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
FIRST = f"<think>\n{THOUGHT}\n</think>\n\nLet me see.\n{CALL}"
LAST, PLAIN = "It is 5.", "Five, I think."
_CALLED = {"function": {"name": "add", "arguments": {"a": 2}}}
_TURNS: list[Any] = [
    QUESTION,
    {"role": "assistant", "content": "Let me see.", "reasoning_content": THOUGHT, "tool_calls": [_CALLED]},
    {"role": "tool", "content": "5"},
]
_MOST_STEPS = 400


def learn_pair(folder: Path) -> tuple[Path, Path]:
    """Folders of a target that knows the texts and of a draft that is not always right. Takes some seconds."""
    tokenizer = byte_tokenizer([END, "<tool_call>", "</tool_call>"], ["<think>", "</think>"])
    tokenizer.eos_token, tokenizer.chat_template = END, THINKING
    lessons = []
    for messages, tools, answer in ((_TURNS[:1], [ADD], FIRST), (_TURNS, [ADD], LAST), (_TURNS[:1], None, PLAIN)):
        text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        lessons.append((tokenizer.encode(text), tokenizer.encode(answer + END)))
    made = []
    for name, width, enough in (("target", 64, 0.01), ("draft", 32, 0.3)):
        model = _learnt(lessons, width, len(tokenizer), tokenizer.eos_token_id, enough)
        for part in (model, tokenizer):
            part.save_pretrained(folder / name)
        made.append(folder / name)
    return made[0], made[1]


def _learnt(
    lessons: list[tuple[list[int], list[int]]], width: int, vocabulary: int, end: int, enough: float
) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(width)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, max_position_embeddings=1024,
                bos_token_id=None, eos_token_id=end, pad_token_id=None,
            )
        )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(_MOST_STEPS):
        optimizer.zero_grad()
        losses = []
        for prompt, answer in lessons:
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
            loss.backward()
            losses.append(loss.item())
        if max(losses) < enough:
            break
        optimizer.step()
    return model
