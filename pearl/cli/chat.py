"""``pearl chat``: a conversation in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from pearl.cli.answer import TextDisplay, generate_answer
from pearl.cli.conversation import Conversation
from pearl.cli.grouping import spread
from pearl.cli.line_reader import LineReader
from pearl.cli.loading import loaded
from pearl.cli.options import EngineOptions, OutputOptions, SamplingOptions
from pearl.cli.summary import Summary
from pearl.cli.terminal import Terminal
from pearl.errors import InvalidRequestError
from pearl.llm import LLM
from pearl.sampling_params import SamplingParams

WELCOME = "/help lists the commands · Ctrl-C stops an answer · Ctrl-D leaves"


@spread
def chat(
    system: Annotated[str | None, typer.Option(help="System message, before everything else.")] = None,
    *,
    engine: EngineOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
) -> None:
    """Talk with a model that has a chat template.

    Ctrl-C stops an answer and keeps it in the conversation; Ctrl-D leaves.
    """
    params = sampling.params()
    terminal = Terminal.open(output.no_color)
    with loaded(engine, terminal) as llm:
        Repl(terminal, llm, params, engine.method, system).run()


class Repl:
    """Reads messages and commands until the user leaves."""

    def __init__(self, terminal: Terminal, llm: LLM, params: SamplingParams, method: str, system: str | None) -> None:
        self._terminal, self._llm, self._params, self._method = terminal, llm, params, method
        room = min(params.max_tokens, llm.max_model_len // 4)  # an answer that is cut later is better than none
        self._conversation = Conversation(llm.tokenizer.render_chat, llm.max_model_len - room, system)
        self._conversation.ask("?")  # a model that cannot chat is refused now, not after the first message
        self._total = Summary()
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
        if not line.startswith("/"):
            self._answer(line)
        elif line in self._commands:
            self._commands[line][1]()
        else:
            self._terminal.note(f"{line.split()[0]} is not a command; the commands are {', '.join(self._commands)}")

    def _answer(self, question: str) -> None:
        """One turn. A refused message leaves the conversation as it was."""
        try:
            prompt = self._conversation.ask(question)
            self._llm.encode(prompt.token_ids)  # the text may name tokens that the model has no row for
        except InvalidRequestError as error:
            self._terminal.error(str(error))
            return
        if prompt.dropped:
            oldest = "the oldest turn was" if prompt.dropped == 1 else f"the {prompt.dropped} oldest turns were"
            self._terminal.note(f"the conversation no longer fits into the context; {oldest} forgotten", "yellow")
        display = TextDisplay(self._terminal, self._llm, prompt.token_ids, end_lines=True)
        answer = generate_answer(self._llm, prompt.token_ids, self._params, display)
        self._total += answer.summary
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
