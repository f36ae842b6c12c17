"""Questions as token ids: by the model's chat template where it has one, else as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from bench.evaluation.data_sets import Question
from pearl.llm import LLM


class TooLongError(ValueError):
    """A question that, with its answer, is longer than the models' context."""


class Conversations:
    """``chat``: whether the template is used. ``max_tokens``: of an answer, for which room is kept."""

    def __init__(self, llm: LLM, chat: bool, max_tokens: int) -> None:
        # One more, so that the model can be asked about any token of the answer.
        self._llm, self._chat, self._room = llm, chat, llm.max_model_len - max_tokens - 1

    def ids(self, question: Question, turn: int, answers: Sequence[Sequence[int]]) -> list[int]:
        """Of the conversation up to the question's ``turn``, before which ``answers`` were given, a list of ids each.

        Worked examples are left out, the first ones first, until the rest fits. TooLongError if nothing does.
        """
        said = [self._llm.tokenizer.decode(_without_end(ids, self._llm.tokenizer.eos_ids)).strip() for ids in answers]
        for left_out in range(len(question.examples) + 1):
            first = "".join(question.examples[left_out:]) + question.turns[0]
            asked = [first, *question.turns[1 : turn + 1]]
            ids = self._encode(asked, said, len(question.turns) > 1)
            if len(ids) <= self._room:
                return ids
        raise TooLongError(f"{question.key} takes {len(ids)} tokens; with an answer there is room for {self._room}")

    def _encode(self, asked: Sequence[str], said: Sequence[str], turns: bool) -> list[int]:
        tokenizer = self._llm.tokenizer
        if self._chat:
            messages = [{"role": "user", "content": asked[0]}]
            for answer, question in zip(said, asked[1:], strict=True):
                messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
            return tokenizer.render_chat(messages)
        if not turns:
            return tokenizer.encode(asked[0])
        pairs = zip(asked, [*said, ""], strict=True)
        return tokenizer.encode("\n\n".join(f"{question}\n\n{answer}".rstrip() for question, answer in pairs) + "\n\n")


def _without_end(ids: Sequence[int], eos_ids: frozenset[int]) -> list[int]:
    return [*(ids[:-1] if ids and ids[-1] in eos_ids else ids)]
