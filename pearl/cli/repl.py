"""The loop of ``pearl chat``: messages, commands, answers."""

from __future__ import annotations

import re
from collections.abc import Callable

from pearl.cli.answer import TextDisplay, generate_answer
from pearl.cli.comparison import Exchange
from pearl.cli.conversation import Conversation
from pearl.cli.line_reader import LineReader
from pearl.cli.summary import Summary
from pearl.cli.terminal import Terminal
from pearl.errors import InvalidRequestError
from pearl.llm import LLM
from pearl.sampling_params import SamplingParams

WELCOME = "/help lists the commands · Ctrl-C stops an answer · Ctrl-D leaves"


class Repl:
    """Reads messages and commands until the user leaves."""

    def __init__(self, terminal: Terminal, llm: LLM, params: SamplingParams, method: str, system: str | None) -> None:
        self._terminal, self._llm, self._params, self._method = terminal, llm, params, method
        room = min(params.max_tokens, llm.max_model_len // 4)  # an answer that is cut later is better than none
        self._conversation = Conversation(llm.tokenizer.render_chat, llm.max_model_len - room, system)
        self._conversation.ask("?")  # a model that cannot chat is refused now, not after the first message
        self._total = Summary()
        self.exchanges: list[Exchange] = []  # all of them, also those that were forgotten
        self._open = True
        self._lines = LineReader("> ", bold=terminal.colored)
        self._commands: dict[str, tuple[str, Callable[[], None]]] = {
            "/help": ("list the commands", self._help),
            "/reset": ("forget the conversation; the system message stays", self._reset),
            "/stats": ("totals of all answers so far", self._stats),
            "/exit": ("leave (also Ctrl-D)", self._exit),
        }

    def run(self) -> None:
        self._welcome()
        while self._open:
            try:
                self._handle(self._lines.read().strip())
            except InvalidRequestError as error:  # the line is refused; the conversation is as before
                self._terminal.error(str(error))
            except EOFError:
                if self._lines.interactive:
                    self._terminal.write("\n")
                return
            except KeyboardInterrupt:  # at the prompt; while an answer is generated, Ctrl-C only ends the answer
                if not self._lines.interactive:
                    raise
                self._terminal.write("\n")
                self._terminal.note("Ctrl-D or /exit leaves")

    def _welcome(self) -> None:
        if self._lines.interactive:
            self._terminal.note(WELCOME)
            self._terminal.legend()

    def _handle(self, line: str) -> None:
        if not line:
            return
        if line in self._commands:
            self._commands[line][1]()
        elif re.fullmatch(r"/\w*", line):  # a question may begin with a path
            self._terminal.note(f"{line} is not a command; the commands are {', '.join(self._commands)}")
        else:
            self._answer(line)

    def _answer(self, question: str) -> None:
        """One turn. Raises InvalidRequestError for a refused message."""
        prompt = self._conversation.ask(question)
        if prompt.dropped:
            oldest = "the oldest turn was" if prompt.dropped == 1 else f"the {prompt.dropped} oldest turns were"
            self._terminal.note(f"the conversation no longer fits into the context; {oldest} forgotten", "yellow")
        display = TextDisplay(self._terminal, self._llm, prompt.token_ids, end_lines=True)
        answer = generate_answer(self._llm, prompt.token_ids, self._params, display)
        self._total += answer.summary
        self.exchanges.append(Exchange(prompt.token_ids, answer.outputs[0].token_ids, answer.summary))
        if text := answer.outputs[0].text:
            self._conversation.add(question, text)
        self._terminal.note(answer.closing_line(self._method))

    def _help(self) -> None:
        for name, (meaning, _) in self._commands.items():
            self._terminal.note(f"{name:8}{meaning}")

    def _reset(self) -> None:
        self._conversation.reset()
        self._terminal.note("the conversation is forgotten")

    def _stats(self) -> None:
        turns = len(self._conversation.turns)
        self._terminal.note(f"turns in the conversation: {turns} · {self._total.line(self._method)}")

    def _exit(self) -> None:
        self._open = False
