"""Chats whose template and text a test writes: a tokenizer of one token a byte, and an engine that says the text."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from fake_engine import FakeEngine, ask
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers import models as backends
from transformers import PreTrainedTokenizerFast

from pearl import LLM
from pearl.admission import Admission
from pearl.messages import TokenLogprobs
from pearl.models import Tokenizer
from pearl.outputs import FinishReason, RequestMetrics, StreamChunk
from pearl.request_factory import RequestFactory

TEMPLATE = """
{%- if tools %}Answer, or write <tool_call>{name, arguments}</tool_call>, with one of
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}
{%- for m in messages %}<{{ m.role }}>{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ "\n" }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{{ "\n" }}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
THINKING = (
    TEMPLATE.replace(
        "{{ m.content }}", r"{% if m.reasoning_content %}<think>{{ '\n' + m.reasoning_content }}{{ '\n</think>\n\n' }}"
        "{% endif %}{{ m.content }}",
    ) + r"{% if enable_thinking %}<think>{{ '\n' }}{% endif %}"
)  # fmt: skip
QUESTION = {"role": "user", "content": "2 + 3?"}
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "strict": True,  # which openai's streaming helper wants
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
CHAT = "/v1/chat/completions"
_CONTEXT = 4096


def byte_tokenizer(special: Sequence[str] = (), added: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A token a byte; and these texts, which are one token each."""
    backend = Backend(backends.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def talker(llm: LLM, template: str | None = TEMPLATE, special: Sequence[str] = (), added: Sequence[str] = ()) -> LLM:
    """``llm`` for a FakeEngine, with another tokenizer."""
    tokenizer = byte_tokenizer(special, added)
    tokenizer.chat_template = template
    changed = copy.copy(llm)
    changed.tokenizer = Tokenizer(tokenizer, frozenset())
    changed.max_model_len = _CONTEXT
    changed.models = dataclasses.replace(llm.models, tokenizer=changed.tokenizer, max_model_len=_CONTEXT)
    changed._admission = Admission(changed.tokenizer, llm.models.vocab_size, _CONTEXT)
    changed._factory = RequestFactory(llm.config, changed.models)
    return changed


def script(
    llm: LLM, pieces: Sequence[str], end: FinishReason = "stop", shown: Collection[int] = (), index: int = 0
) -> list[StreamChunk]:
    """Chunks of these texts, of the tokens that an output of them has; every third token is the draft's."""
    chunks, count = [], 0
    detokenizer = llm.tokenizer.detokenizer((), shown)
    for place, piece in enumerate(pieces):
        tokens = llm.tokenizer.encode(piece, add_special_tokens=False)
        drafted = tuple((count + i) % 3 == 0 for i in range(len(tokens)))
        count += len(tokens)
        last = place == len(pieces) - 1
        text = detokenizer.feed(tokens) + (detokenizer.flush() if last else "")
        logprobs = tuple(TokenLogprobs(-0.5, ((token, -0.5),)) for token in tokens)
        reason = end if last else None
        metrics = RequestMetrics()
        chunks.append(StreamChunk(index, text, tuple(tokens), drafted, reason, metrics, None, logprobs))
    return chunks


def chat(engine: FakeEngine, server: dict[str, Any] | None = None, **body: Any) -> Any:
    """The answer to QUESTION, or to other ``messages``."""
    response = ask(engine, "POST", CHAT, server, json={"messages": [QUESTION], **body})
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(engine: FakeEngine) -> str:
    """What the latest request has asked for."""
    return engine.llm.tokenizer.decode(engine.asked[-1][0])
