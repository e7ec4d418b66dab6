"""How copy engines are kept from each other's rows, whatever each stream of each GPU takes its time for.

The streams are simulated: queues of work, of which any that may go on does next. On GPUs: `test_two_gpus.py`.
"""

from collections import deque

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.copy_engines import CopyEngines, _copy

ROUNDS, BOXES, BLOCKS, WIDTH = 3, 2, 3, 5


class Simulated(CopyEngines):
    """One rank's, whose streams are queues of (may it be done, do it)."""

    def __init__(self, me, ranks, shared):
        self.shared, self.calls = shared, 0
        self.main, self.sending, self.arriving = deque(), deque(), deque()
        self._set_up(me, ranks, BOXES)

    def share(self, size):
        self.calls += 1
        return self.shared.setdefault(self.calls, [torch.zeros(size, dtype=torch.uint8) for _ in range(self.ranks)])

    def do(self, stream, action, ready=lambda: True):
        stream.append((ready, action))

    def mark(self, stream):
        mark = []
        self.do(stream, lambda: mark.append(True))
        return mark

    def join(self, mark):
        self.do(self.main, lambda: None, lambda: bool(mark))

    def fork(self, stream):
        mark = self.mark(self.main)
        self.do(stream, lambda: None, lambda: bool(mark))

    def copy(self, stream, to, rows):
        self.do(stream, lambda: _copy(to, rows))

    def await_word(self, stream, word):
        self.do(stream, lambda: word.zero_(), lambda: word == 1)

    def set_word(self, stream, word):
        def action():
            assert word == 0
            word.fill_(1)

        self.do(stream, action)


def sent(size, a, b, turn, box):
    """What rank `a` sends rank `b`, as rows that lie apart."""
    return torch.full((BLOCKS, size, WIDTH), float(1000 * turn + 100 * box + 10 * a + b))


def programme(rank, sizes, wrong):
    """All that a rank's host launches: in every turn both boxes are under way at once. What was sent from and what it
    came into are written over as soon as that is allowed."""
    others = rank.others
    for turn, size in enumerate(sizes):
        boxes = [rank.box(number) for number in range(BOXES)]
        under_way = []
        for number, box in enumerate(boxes):
            rows = torch.zeros(BLOCKS, len(others), size, WIDTH).transpose(0, 1)
            scales, own, kept = torch.zeros(len(others), size), torch.zeros(size), torch.zeros(size)
            into = [torch.zeros(BLOCKS, len(others), size, WIDTH).transpose(0, 1), torch.zeros(len(others), size)]

            def write(rows=rows, scales=scales, own=own, turn=turn, number=number, size=size):
                for index, other in enumerate(others):
                    rows[index] = sent(size, rank.me, other, turn, number)
                    scales[index] = rank.me + turn
                own.fill_(turn + number)

            rank.do(rank.main, write)
            box.start([rows, scales], into, [(kept, own)])
            under_way.append((rows, scales, own, kept, into))
        for number, (box, (rows, scales, own, kept, into)) in enumerate(zip(boxes, under_way, strict=True)):
            box.land()

            def read(into=into, kept=kept, turn=turn, number=number, size=size):
                for index, other in enumerate(others):
                    if not (
                        torch.equal(into[0][index], sent(size, other, rank.me, turn, number))
                        and (into[1][index] == other + turn).all()
                        and (kept == turn + number).all()
                    ):
                        wrong.append((rank.me, turn, number, other))

            rank.do(rank.main, read)
            for tensor in (rows, scales, own, kept, *into):
                rank.do(rank.main, lambda tensor=tensor: tensor.fill_(-1))


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.integers(2, 4),
    sizes=st.lists(st.integers(1, 6), min_size=ROUNDS, max_size=ROUNDS),
    order=st.randoms(use_true_random=False),
)
def test_every_row_arrives_whatever_waits_for_what(ranks, sizes, order):
    shared, wrong = {}, []
    places = [Simulated(rank, ranks, shared) for rank in range(ranks)]
    for place in places:
        programme(place, sizes, wrong)
    streams = [stream for place in places for stream in (place.main, place.sending, place.arriving)]
    while any(streams):
        able = [stream for stream in streams if stream and stream[0][0]()]
        assert able, "all streams wait for each other"
        order.choice(able).popleft()[1]()
    assert wrong == []
