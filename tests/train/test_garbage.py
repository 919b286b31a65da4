"""What is left in cycles while a run goes on is found soon."""

import gc
import weakref

import pytest

from flowkern.train import garbage


class Cycle:
    def __init__(self):
        self.itself = self
        self.parts = [[] for _ in range(10)]


def cycles_left(pictures=40, count=200):
    """How many lie about once as many pictures were drawn, whose parts grow old while it lasts."""
    made = []
    for _ in range(pictures):
        drawn = [Cycle() for _ in range(count)]
        made += [weakref.ref(one) for one in drawn]
        for generation in (0, 1):
            gc.collect(generation)
    return sum(one() is not None for one in made) - len(drawn)


def test_cycles_are_few_beside_many_objects_that_stay():
    stay = [[] for _ in range(400_000)]
    gc.collect()
    without = cycles_left()
    with garbage.found_soon():
        assert gc.get_freeze_count() > len(stay)
        left = cycles_left()
    assert left < without / 2, (left, without)


def test_nothing_stays_set_apart():
    with pytest.raises(KeyError), garbage.found_soon():
        with garbage.found_soon():
            pass
        assert gc.get_freeze_count(), "the outer one goes on"
        raise KeyError
    assert not gc.get_freeze_count()
