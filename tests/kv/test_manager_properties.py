"""Random rounds over simulated KV: whatever happens, every sequence reads exactly its own tokens.

A slot's content stands for the keys and values of one token. They depend on all tokens before it, so the simulated
slot holds the whole prefix: a page that was reused, shared or found wrongly cannot look right by accident.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pearl.kv import KVCacheManager, OutOfPages, PageCopy, PrefixKey

Tokens = tuple[int, ...]
TOKEN = st.integers(0, 1)  # so few that prefixes coincide all the time
DRAFT = st.lists(TOKEN, max_size=5)
PROMPT = st.lists(TOKEN, min_size=1, max_size=10)
MAX_LIVE = 5  # sequences at a time
MAX_LENGTH = 24  # tokens of a sequence, drafted ones included


@dataclass
class Live:
    """A sequence as the scheduler sees it: KV is valid for [0, computed) of committed + pending tokens."""

    committed: list[int]
    computed: int
    pending: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.committed + self.pending

    def judge(self, accepted: int, correction: int | None) -> None:
        """Commit ``accepted`` pending tokens; a correction replaces the next one, and ends what is pending."""
        length = len(self.committed)
        held, rest = self.pending[:accepted], self.pending[accepted:]
        self.committed += held
        self.pending = rest
        if correction is not None:
            self.committed.append(correction)
            self.computed = min(self.computed, length + accepted)
            self.pending = []


class Branched(NamedTuple):
    """Another continuation of a sequence: ``tokens``, of which the first ``start`` are the sequence's."""

    seq_id: int
    tokens: list[int]
    start: int
    late: bool
    copy: PageCopy | None


class Memory:
    """What a worker's KV tensors hold: for each page the prefix that was written to each slot."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._page_size = page_size
        self.pages: list[list[Tokens]] = [[()] * page_size for _ in range(num_pages)]

    def copy(self, copies: list[PageCopy]) -> None:
        for copy in copies:
            self.pages[copy.destination] = list(self.pages[copy.source])

    def write(self, table: Tokens, tokens: list[int], start: int, end: int) -> None:
        for position in range(start, end):
            page, slot = table[position // self._page_size], position % self._page_size
            self.pages[page][slot] = tuple(tokens[: position + 1])

    def check(self, table: Tokens, tokens: list[int], end: int) -> None:
        for position in range(end):
            content = self.pages[table[position // self._page_size]][position % self._page_size]
            assert content == tuple(tokens[: position + 1]), f"position {position} of {tokens} holds {content}"


def prefix_of(key: PrefixKey) -> Tokens:
    before = prefix_of(key.parent) if key.parent else ()
    return before + key.tokens


class Rounds(RuleBasedStateMachine):
    """Each rule is one disturbance and the rounds after it: hypothesis leaves out rules at random, rounds never."""

    @initialize(
        num_tokens=st.integers(MAX_LENGTH, 3 * MAX_LENGTH),
        page_size=st.sampled_from([4, 2, 1]),
        lookahead=st.sampled_from([64, 4, 1]),
    )
    def build(self, num_tokens: int, page_size: int, lookahead: int) -> None:
        num_pages = num_tokens // page_size
        self.kv = KVCacheManager(num_pages, page_size, lookahead=lookahead)
        self.lookahead = lookahead
        self.memory = Memory(num_pages, page_size)
        self.live: dict[int, Live] = {}
        self.begun = 0
        self.verified: set[Tokens] = set()  # every prefix that was committed and computed at some time
        self.written: list[list[int]] = []  # what was computed in each forward, rejected tokens too

    def new_id(self) -> int:
        """An id for one sequence more; the oldest makes room if there are many already."""
        if len(self.live) == MAX_LIVE:
            self.drop(min(self.live))
        self.begun += 1
        return self.begun

    def start(self, seq_id: int, tokens: list[int]) -> None:
        cached = self.kv.begin(seq_id, tokens)
        assert cached % self.kv.page_size == 0
        assert cached < len(tokens)
        assert self.kv.capacity_tokens(seq_id) == cached
        assert cached == 0 or tuple(tokens[:cached]) in self.verified, "found, but was never verified"
        self.live[seq_id] = Live(list(tokens), cached)

    def draw_id(self, data: st.DataObject) -> int:
        if not self.live:
            self.begin_anything(data)
        return data.draw(st.sampled_from(sorted(self.live)))

    def drop(self, seq_id: int) -> Live:
        self.kv.free(seq_id)
        return self.live.pop(seq_id)

    def begin_anything(self, data: st.DataObject) -> None:
        """Often like something that was computed once, whether it was rejected or not."""
        known = data.draw(st.sampled_from([[], *self.written[-20:]]))
        self.start(self.new_id(), [*known[: MAX_LENGTH // 2], *data.draw(PROMPT)])

    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.begin_anything(data)
        self.rounds(data)

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        self.rounds(data)
        child = self.new_id()
        parent = self.draw_id(data)
        free = self.kv.num_free_pages
        self.kv.fork(parent, child)
        assert self.kv.block_table(child) == self.kv.block_table(parent)
        assert self.kv.num_free_pages == free
        state = self.live[parent]
        self.live[child] = Live(list(state.committed), state.computed, list(state.pending))
        self.rounds(data)

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.drop(self.draw_id(data))
        self.rounds(data)

    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        """Somebody waits at its beginning, while others come further."""
        waiting = self.new_id()
        like = self.live[self.draw_id(data)].committed[: MAX_LENGTH // 2]
        self.start(waiting, [*like, *data.draw(PROMPT)])
        self.rounds(data, resting=waiting)
        if waiting not in self.live:
            return
        state = self.live[waiting]
        found = self.kv.extend(waiting, state.committed)
        state.computed += found
        assert self.kv.capacity_tokens(waiting) == state.computed < len(state.committed)
        assert found == 0 or tuple(state.committed[: state.computed]) in self.verified
        self.rounds(data)

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        seq_id = self.draw_id(data)
        self.start(seq_id, self.drop(seq_id).committed)
        self.rounds(data)

    @rule(data=st.data(), replacement=st.lists(TOKEN, min_size=1, max_size=4))
    def rewrite_history(self, data: st.DataObject, replacement: list[int]) -> None:
        """Roll back below what is committed, and perhaps cached; other tokens follow."""
        state = self.live[seq_id := self.draw_id(data)]
        length = data.draw(st.integers(0, len(state.committed)))
        state.committed, state.pending = state.committed[:length] + replacement, []
        state.computed = min(state.computed, length)
        self.kv.truncate(seq_id, state.computed)
        self.rounds(data)

    def rounds(self, data: st.DataObject, resting: int | None = None) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            self.one_round(data, resting)
            self.bookkeeping_is_consistent()
            self.sequences_read_their_own_tokens()
            self.the_cache_holds_verified_content_only()

    def one_round(self, data: st.DataObject, resting: int | None) -> None:
        """Reserve for some sequences, as the scheduler does; then compute them all; then verify and roll back."""
        busy = self.draw_id(data)
        idle = data.draw(st.sets(st.sampled_from(sorted(self.live)))) - {busy} | {resting}
        planned: dict[int, int] = {}  # where the sequence's forward ends
        copies: list[PageCopy] = []
        victims: dict[int, Live] = {}
        for seq_id in sorted(self.live.keys() - idle):
            if seq_id in self.live:
                state = self.live[seq_id]
                state.pending += data.draw(DRAFT)[: MAX_LENGTH - len(state.tokens)]
                end = max(state.computed, len(state.tokens) - data.draw(st.integers(0, 2)))
                victims |= self.make_room(seq_id, end, planned)
                if seq_id in self.live:
                    copies += self.reserve(seq_id, end)
                    planned[seq_id] = end
        if not victims:
            destinations = [copy.destination for copy in copies]
            assert len(set(destinations)) == len(destinations)
            assert not {copy.source for copy in copies} & set(destinations), "the order of the copies matters"
        branches = self.branch(data, planned, {copy.destination: copy.source for copy in copies})
        self.memory.copy(copies + [branch.copy for branch in branches if branch.copy and not branch.late])
        if computes := data.draw(st.integers(0, 7)) < 7:  # else the forward has failed: nothing is written
            self.compute(planned)
            self.memory.copy([branch.copy for branch in branches if branch.copy and branch.late])
            for number, branch in enumerate(branches):
                table = self.kv.branch_table(-number)
                self.memory.write(table, branch.tokens, branch.start, len(branch.tokens))
                self.written.append(branch.tokens)
        self.bookkeeping_is_consistent([self.kv.branch_table(-number) for number in range(len(branches))])
        self.end_branches(data, branches, computes)
        for seq_id in planned:
            self.settle(data, seq_id)
        for seq_id, state in victims.items():
            self.start(seq_id, state.committed)

    def branch(self, data: st.DataObject, planned: dict[int, int], origin: dict[int, int]) -> list[Branched]:
        """Other continuations of planned sequences, from what is computed, or will be in this round's forward."""
        branches: list[Branched] = []
        for _ in range(data.draw(st.integers(0, 3)) if planned else 0):
            seq_id = data.draw(st.sampled_from(sorted(planned)))
            state, late = self.live[seq_id], data.draw(st.booleans())
            first, last = len(state.committed), planned[seq_id] if late else state.computed
            if last < first:  # only what is not verified is continued in another way
                continue
            start = last if late else data.draw(st.integers(first, last))
            tokens = [*state.tokens[:start], *data.draw(PROMPT)][: max(MAX_LENGTH + 4, start + 1)]
            before = self.snapshot(), self.kv.block_table(seq_id)
            try:
                copy = self.kv.branch(seq_id, -len(branches), start, len(tokens))
            except OutOfPages:
                assert (self.snapshot(), self.kv.block_table(seq_id)) == before, "a branch that fails changes nothing"
                continue
            if copy is not None and not late:
                copy = PageCopy(origin.get(copy.source, copy.source), copy.destination)
            branches.append(Branched(seq_id, tokens, start, late, copy))
        return branches

    def end_branches(self, data: st.DataObject, branches: list[Branched], computed: bool) -> None:
        """They read what they were written; then one of a sequence may be what it goes on as, the others are lost."""
        lucky = {branch.seq_id: number for number, branch in enumerate(branches) if data.draw(st.booleans())}
        for number, branch in enumerate(branches if computed else []):  # before a sequence gives up pages for another
            self.memory.check(self.kv.branch_table(-number), branch.tokens, len(branch.tokens))
        for number, branch in enumerate(branches):
            if not computed or lucky.get(branch.seq_id) != number:
                self.kv.drop(-number)
                continue
            table, state = self.kv.branch_table(-number), self.live[branch.seq_id]
            self.kv.adopt(-number)
            assert self.kv.block_table(branch.seq_id) == table
            state.committed, state.pending = branch.tokens[: branch.start + 1], branch.tokens[branch.start + 1 :]
            state.computed = len(branch.tokens)

    def make_room(self, seq_id: int, end: int, planned: dict[int, int]) -> dict[int, Live]:
        """Preempt sequences that are not planned yet, in the end ``seq_id`` itself."""
        victims: dict[int, Live] = {}
        while seq_id in self.live and not self.kv.can_reserve(seq_id, end, self.live[seq_id].computed):
            before = self.snapshot()
            with pytest.raises(OutOfPages):
                self.kv.reserve(seq_id, end, self.live[seq_id].computed)
            assert self.snapshot() == before, "a reserve that fails changes nothing"
            victim = max((other for other in self.live if other not in planned and other != seq_id), default=seq_id)
            victims[victim] = self.drop(victim)
        return victims

    def snapshot(self) -> object:
        cached = {prefix_of(key): entry.page for key, entry in self.kv._pool._cache.items()}
        sequences = [(list(s.pages), list(s.prefix), s.own_from) for s in self.kv._sequences.values()]
        return sequences, self.kv.num_free_pages, self.kv.stats, cached

    def reserve(self, seq_id: int, end: int) -> tuple[PageCopy, ...]:
        start, size = self.live[seq_id].computed, self.kv.page_size
        before, free = self.kv.block_table(seq_id), self.kv.num_free_pages
        written = range(start // size, -(-end // size)) if start < end else range(0)
        others = {page for other in self.live if other != seq_id for page in self.kv.block_table(other)}
        shared = sum(index < len(before) and before[index] in others for index in written)
        copies = self.kv.reserve(seq_id, end, start)
        table = self.kv.block_table(seq_id)
        wanted = max(len(before), -(-end // size))
        ahead = len(table) - wanted
        assert free - self.kv.num_free_pages == wanted - len(before) + shared + ahead
        assert ahead == 0 or (wanted > len(before) and self.kv.num_free_pages >= len(self.live))
        assert ahead in range(wanted // self.lookahead + 1)
        assert self.kv.capacity_tokens(seq_id) >= end
        assert table[: start // size] == before[: start // size]
        for index in written:
            assert table[index] not in others, "a shared page would be overwritten"
            assert all(entry.page != table[index] for entry in self.kv._pool._cache.values()), "a cached page too"
        return copies

    def compute(self, planned: dict[int, int]) -> None:
        for seq_id, end in planned.items():
            state = self.live[seq_id]
            self.memory.write(self.kv.block_table(seq_id), state.tokens, state.computed, end)
            self.written.append(state.tokens[:end])
            state.computed = end

    def settle(self, data: st.DataObject, seq_id: int) -> None:
        """The verdict, or none yet; then what the scheduler does after each round."""
        state = self.live[seq_id]
        correction = data.draw(st.none() | TOKEN)
        state.judge(data.draw(st.integers(0, len(state.pending))), correction)
        valid = state.committed[: state.computed]
        self.verified |= {tuple(valid[:end]) for end in range(len(valid) + 1)}
        if data.draw(st.booleans()):
            self.kv.settle(seq_id, state.committed, state.computed)
            beyond = self.kv.capacity_tokens(seq_id) - state.computed
            held = self.kv.capacity_tokens(seq_id) // self.kv.page_size
            assert beyond in range((2 + held // self.lookahead) * self.kv.page_size)
            assert beyond < self.kv.page_size or self.kv.num_free_pages >= len(self.kv._sequences)
            assert len(self.kv._sequences[seq_id].prefix) == len(valid) // self.kv.page_size
            settled = self.snapshot()
            self.kv.commit(seq_id, state.committed, state.computed)
            assert self.snapshot() == settled, "settle left something to commit"
        else:  # reserve must manage without truncate
            self.kv.commit(seq_id, state.committed, state.computed)
        if len(state.committed) >= MAX_LENGTH:
            self.drop(seq_id)

    @invariant()
    def bookkeeping_is_consistent(self, branches: Sequence[Tokens] = ()) -> None:
        self.kv.check_integrity()
        tables = [*(self.kv.block_table(seq_id) for seq_id in self.live), *branches]
        in_use = {page for table in tables for page in table}
        assert self.kv.num_free_pages == self.kv.num_pages - len(in_use)
        assert self.kv.usage == pytest.approx(len(in_use) / self.kv.num_pages)

    @invariant()
    def sequences_read_their_own_tokens(self) -> None:
        for seq_id, state in self.live.items():
            self.memory.check(self.kv.block_table(seq_id), state.tokens, state.computed)

    @invariant()
    def the_cache_holds_verified_content_only(self) -> None:
        """Bug 8 of others: unverified full pages are hashed, or rollback leaves a stale hash."""
        size = self.kv.page_size
        for key, entry in self.kv._pool._cache.items():
            prefix = prefix_of(key)
            assert prefix in self.verified, f"{prefix} can be found, but was never verified"
            expected = [prefix[: len(prefix) - size + slot + 1] for slot in range(size)]
            assert self.memory.pages[entry.page] == expected, f"page {entry.page} is stale"

    def teardown(self) -> None:
        for seq_id in self.live:
            self.kv.free(seq_id)
        self.kv.check_integrity()
        assert self.kv.num_free_pages == self.kv.num_pages


TestRounds = Rounds.TestCase
TestRounds.settings = settings(max_examples=40, stateful_step_count=20, deadline=None, derandomize=True)
