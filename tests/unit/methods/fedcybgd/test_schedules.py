"""Schedules of FedCyBGD: which client trains which block in which cycle, and in which group."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from fluvial.methods.fedcybgd.schedule import Order, assignment, groups, wall_clock
from tests.support import ROOT

ORDERS: tuple[Order, ...] = ("ascending", "descending", "random", "latin", "latin-random", "pairs")

clients_ = st.integers(1, 40)

blocks_ = st.integers(1, 24)

seeds_ = st.integers(0, 2**32)

cycles_ = st.integers(0, 60)


@given(order=st.sampled_from(ORDERS), clients=clients_, blocks=blocks_, cycle=cycles_, seed=seeds_)
@examples(max_examples=100, deadline=None)
def test_every_client_has_a_block_that_the_seed_and_the_cycle_determine(
    order: Order, clients: int, blocks: int, cycle: int, seed: int
) -> None:
    assigned = assignment(order, clients=clients, blocks=blocks, cycle=cycle, seed=seed)
    assert len(assigned) == clients
    assert all(0 <= block < blocks for block in assigned)
    assert assignment(order, clients=clients, blocks=blocks, cycle=cycle, seed=seed) == assigned


@given(
    order=st.sampled_from(("ascending", "descending", "latin", "latin-random", "pairs")),
    blocks=blocks_,
    clients=clients_,
    cycle=cycles_,
    seed=seeds_,
)
@examples(max_examples=100, deadline=None)
def test_every_block_is_visited_equally(
    order: Order, blocks: int, clients: int, cycle: int, seed: int
) -> None:
    visits = Counter(assignment(order, clients=clients, blocks=blocks, cycle=cycle, seed=seed))
    least, most = clients // blocks, -(-clients // blocks)  # the same where D divides N
    assert all(least <= visits[block] <= most for block in range(blocks))


@given(
    order=st.sampled_from(("latin", "latin-random", "random")),
    blocks=blocks_,
    clients=clients_,
    turn=st.integers(0, 3),
    seed=seeds_,
)
@examples(max_examples=60, deadline=None)
def test_every_client_meets_every_block_once_in_as_many_cycles(
    order: Order, blocks: int, clients: int, turn: int, seed: int
) -> None:
    cycles = [
        assignment(order, clients=clients, blocks=blocks, cycle=cycle, seed=seed)
        for cycle in range(turn * blocks, (turn + 1) * blocks)
    ]
    for met in zip(*cycles, strict=True):
        assert sorted(met) == list(range(blocks))


@given(blocks=blocks_, clients=clients_, cycle=cycles_)
def test_ascending_is_the_same_every_cycle_and_descending_mirrors_it(
    blocks: int, clients: int, cycle: int
) -> None:
    ascending = assignment("ascending", clients=clients, blocks=blocks, cycle=cycle, seed=0)
    assert ascending == [client % blocks for client in range(clients)]
    assert assignment("pairs", clients=clients, blocks=blocks, cycle=cycle, seed=0) == ascending
    descending = assignment("descending", clients=clients, blocks=blocks, cycle=cycle, seed=0)
    assert descending == [blocks - 1 - block for block in ascending]


def test_latin_moves_every_client_to_the_next_block() -> None:
    assert [
        assignment("latin", clients=4, blocks=4, cycle=cycle, seed=0) for cycle in range(3)
    ] == [
        [0, 1, 2, 3],
        [1, 2, 3, 0],
        [2, 3, 0, 1],
    ]


def test_full_hands_the_whole_model_on() -> None:
    assert assignment("full", clients=5, blocks=1, cycle=3, seed=0) == [0] * 5


def test_random_orders_differ_by_seed_and_client_and_random_may_leave_blocks_out() -> None:
    def drawn(order: Order, seed: int) -> list[list[int]]:
        return [
            assignment(order, clients=16, blocks=16, cycle=cycle, seed=seed) for cycle in range(4)
        ]

    assert drawn("random", 1) != drawn("random", 2)
    assert drawn("latin-random", 1) != drawn("latin-random", 2)
    assert len({tuple(met) for met in zip(*drawn("random", 1), strict=True)}) == 16
    assert any(len(set(cycle)) < 16 for cycle in drawn("random", 1))
    assert all(len(set(cycle)) == 16 for cycle in drawn("latin-random", 1))


assigned_ = st.lists(st.integers(0, 15), max_size=40)


@given(assigned=assigned_, parallel=st.integers(1, 20), together=st.booleans())
def test_groups_part_the_clients_and_keep_to_their_blocks(
    assigned: list[int], parallel: int, together: bool
) -> None:
    made = groups(assigned, parallel=parallel, together=together)
    assert sorted(client for group in made for client in group) == list(range(len(assigned)))
    for group in made:
        blocks = [assigned[client] for client in group]
        assert 1 <= len(set(blocks)) <= parallel
        if not together:
            assert len(set(blocks)) == len(blocks)

    if together:
        homes = [block for group in made for block in {assigned[client] for client in group}]
        assert len(set(homes)) == len(homes), "all clients of a block are in one group"


@given(
    blocks=st.integers(1, 32),
    parallel=st.integers(1, 32),
    sweeps=st.integers(1, 3),
    together=st.booleans(),
)
def test_blocks_of_a_group_are_far_apart(
    blocks: int, parallel: int, sweeps: int, together: bool
) -> None:
    assigned = assignment("ascending", clients=sweeps * blocks, blocks=blocks, cycle=0, seed=0)
    made = groups(assigned, parallel=parallel, together=together)
    apart = -(-blocks // parallel)
    assert len(made) == apart * (1 if together else sweeps), "no more groups than needed"

    for group in made:
        trained = sorted({assigned[client] for client in group})
        assert all(upper - lower >= apart for lower, upper in itertools.pairwise(trained))


@pytest.mark.parametrize("order", ["ascending", "descending", "latin"])
def test_one_block_at_a_time_clients_visit_in_their_order(order: Order) -> None:
    assigned = assignment(order, clients=12, blocks=4, cycle=1, seed=0)
    assert groups(assigned, parallel=1, together=False) == [[client] for client in range(12)]


def test_a_pair_trains_its_block_from_the_same_state() -> None:
    assigned = assignment("pairs", clients=8, blocks=4, cycle=0, seed=0)
    assert groups(assigned, parallel=1, together=True) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert groups(assigned, parallel=2, together=True) == [[0, 4, 2, 6], [1, 5, 3, 7]]


def test_the_time_of_a_cycle_is_what_the_page_says() -> None:
    assigned = assignment("latin", clients=8, blocks=4, cycle=0, seed=0)
    even = [60.0] * 8
    slow = [300.0 if client == 3 else 60.0 for client in range(8)]
    made = {"FedAvg, all at once": [list(range(8))]}
    made |= {
        f"FedCyBGD, `parallel = {n}`": groups(assigned, parallel=n, together=False)
        for n in (1, 2, 4)
    }
    made |= {
        f"FedBAvg, `parallel = {n}`": groups(assigned, parallel=n, together=True) for n in (1, 4)
    }
    page = (ROOT / "docs" / "methods" / "fedcybgd.md").read_text()

    for name, visits in made.items():
        times = (
            wall_clock(visits, even),
            wall_clock(visits, slow),
            wall_clock(visits, slow, deadline_s=120),
        )
        assert (
            f"| {name} | {len(visits)} | " + " | ".join(f"{each:g}" for each in times) + " |\n"
            in page
        ), name
