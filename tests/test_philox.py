"""Counter-based randomness: the generator itself, and that every split and order gives the same numbers."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from parallel.philox import key_of, normal, normal_at, philox4x32, uniform

WORD = 0xFFFFFFFF


def test_known_answers():
    """The vectors that Random123 publishes for philox4x32-10 (kat_vectors)."""
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, (low, high), expected in cases:
        words = philox4x32(tuple(torch.tensor([word]) for word in counter), low | high << 32)
        assert tuple(int(word) for word in words) == expected


def test_keys_are_stable_and_differ_by_seed_purpose_and_step():
    assert key_of(0, "noise", 1) == 13073165111847060661
    keys = {key_of(seed, purpose, step) for seed in (0, 1) for purpose in ("noise", "time") for step in (0, 1, 10)}
    assert len(keys) == 12
    assert key_of(1, 0) != key_of(10)


@given(st.integers(0, 2**63), st.integers(0, 200_000), st.integers(1, 3000))
@settings(deadline=None, max_examples=40)
def test_any_part_of_a_sequence_is_a_part_of_the_whole(key, start, n):
    whole = normal_at(key, max(0, start - 7), n + 9)
    assert torch.equal(normal_at(key, start, n), whole[min(start, 7) : min(start, 7) + n])


@given(st.permutations(range(12)), st.integers(1, 9))
def test_a_stream_does_not_depend_on_its_neighbours(order, n):
    everything = normal(3, torch.arange(12), n)
    assert torch.equal(normal(3, torch.tensor(order), n), everything[order])
    assert torch.equal(normal(3, torch.arange(12), 9)[:, :n], everything)


def test_uniforms_lie_inside_and_are_uniform():
    draws = uniform(key_of(1, "u"), torch.arange(1000), 100)
    assert draws.min() > 0 and draws.max() < 1
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 0.01


def test_normals_are_normal():
    for draws in (normal(key_of(1, "n"), torch.arange(1000), 100).flatten(), normal_at(key_of(2, "n"), 0, 100_000)):
        assert draws.isfinite().all()
        assert stats.kstest(draws.numpy(), "norm").pvalue > 0.01
        assert abs(stats.pearsonr(draws[:-1].numpy(), draws[1:].numpy()).statistic) < 0.01


def test_golden_values():
    torch.testing.assert_close(
        normal_at(key_of(0, "weights", "patch.weight"), 0, 4), torch.tensor(GOLDEN), rtol=0, atol=1e-6
    )


GOLDEN = [0.4669232, -0.1864488, -2.5400436, 2.690851]
