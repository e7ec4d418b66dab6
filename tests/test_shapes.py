"""The embedded data set: what it shows is what its captions say, and a detector and a judge can tell."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecdit.data.shapes import RELATIONS, TASKS, make, make_task
from ecdit.data.shapes_draw import COLORS, SHAPES, SIZES
from ecdit.evaluate.detect import detect
from ecdit.evaluate.shapes import GENEVAL, score, shows, suite

TEN_THOUSAND = 10_000


@pytest.fixture(scope="module")
def samples():
    return [make(0, index) for index in range(TEN_THOUSAND)]


@pytest.fixture(scope="module")
def found(samples):
    return detect(np.stack([sample.image for sample in samples]))


def test_the_detector_is_right_on_clean_pictures(samples, found):
    def exact(things, scene):
        if scene.task == "digits":
            return shows(things, scene)
        drawn = sorted((o.shape, o.color, o.size, o.x, o.y) for o in scene.objects)
        seen = sorted((t.kind, t.color, t.size, t.x, t.y) for t in things)
        return len(drawn) == len(seen) and all(
            a[:3] == b[:3] and abs(a[3] - b[3]) <= 1 and abs(a[4] - b[4]) <= 1 for a, b in zip(drawn, seen, strict=True)
        )

    right = sum(exact(things, sample.scene) for things, sample in zip(found, samples, strict=True))
    assert right >= 0.999 * TEN_THOUSAND


def test_the_judge_says_yes_to_every_task_on_clean_pictures(samples, found):
    wrong = Counter(s.scene.task for things, s in zip(found, samples, strict=True) if not shows(things, s.scene))
    total = Counter(s.scene.task for s in samples)
    assert all(wrong[task] <= 0.001 * total[task] for task in TASKS)


def test_everything_occurs(samples):
    objects = [thing for sample in samples for thing in sample.scene.objects]
    assert {thing.shape for thing in objects} == set(SHAPES)
    assert {thing.color for thing in objects} == set(COLORS)
    assert {thing.size for thing in objects} == set(SIZES)
    assert {sample.scene.task for sample in samples} == set(TASKS) > set(GENEVAL)
    assert {sample.scene.relation for sample in samples} == {None, *RELATIONS}
    assert {len(sample.scene.objects) for sample in samples} == {0, 1, 2, 3, 4}
    assert {len(sample.scene.digits) for sample in samples if sample.scene.digits} == {1, 2}
    assert max(len(sample.caption.split()) for sample in samples) < 16


def test_captions_state_what_is_judged(samples):
    for sample in samples[:2000]:
        for stated in sample.scene.stated:
            assert all(word in sample.caption for word in stated.values()), sample.caption
        if sample.scene.relation:
            assert sample.scene.relation in sample.caption
        if sample.scene.digits:
            assert sample.scene.digits in sample.caption.split()


def test_golden_samples():
    digest = hashlib.sha256(b"".join(make(0, index).image.tobytes() for index in range(20))).hexdigest()
    assert digest == GOLDEN_IMAGES
    assert [make(0, index).caption for index in range(4)] == [
        "a gray square and a red triangle",
        "four green stars",
        "an image with a small white star",
        "there are four brown rings",
    ]


GOLDEN_IMAGES = "64671258d4b73c5f008cbbc33b1652f35739acc8fa199bc912d5783503f94245"


@given(st.integers(0, 2**32), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_a_sample_is_a_function_of_seed_and_index(seed, index):
    one, same = make(seed, index), make(seed, index)
    assert np.array_equal(one.image, same.image) and one.caption == same.caption
    things = one.scene.objects
    for i, a in enumerate(things):
        assert all(SIZES[a.size] < v < 31 - SIZES[a.size] for v in (a.x, a.y))
        for b in things[:i]:
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > SIZES[a.size] + SIZES[b.size] + 1


def sample_of(task, accept=lambda scene: True):
    rng = np.random.default_rng(0)
    while True:
        sample = make_task(task, rng)
        if accept(sample.scene):
            return sample


def shows_picture(image, scene):
    return shows(detect(image[None])[0], scene)


@pytest.mark.parametrize("task", ["colors", "color_attr", "two_object", "single_object", "position"])
def test_the_judge_says_no_to_another_picture(task):
    sample = sample_of(task)
    stated = sample.scene.stated[0]
    other = sample_of(
        task, lambda s: all(t.shape != stated["shape"] and t.color != stated.get("color") for t in s.objects)
    )
    assert shows_picture(sample.image, sample.scene)
    assert not shows_picture(other.image, sample.scene)


def test_the_judge_counts_and_reads_and_knows_left_from_right():
    three = sample_of("counting", lambda s: len(s.objects) == 3)
    four = sample_of("counting", lambda s: len(s.objects) == 4)
    assert not shows_picture(four.image, three.scene) and not shows_picture(three.image, four.scene)
    left = sample_of("position", lambda s: s.relation == "left of")
    assert not shows_picture(left.image[:, ::-1], left.scene)
    twelve = sample_of("digits", lambda s: s.digits == "12")
    assert not shows_picture(twelve.image, sample_of("digits", lambda s: s.digits == "21").scene)


def test_colors_and_shapes_survive_noise_and_nothing_is_seen_in_nothing(samples):
    rng = np.random.default_rng(0)
    some = [sample for sample in samples[:1500] if sample.scene.task == "colors"]
    noisy = np.stack([sample.image for sample in some]) + rng.normal(0, 8, (len(some), 32, 32, 3))
    things = detect(noisy.clip(0, 255).astype(np.uint8))
    right = [
        bool(t) and (t[0].kind, t[0].color) == (s.scene.objects[0].shape, s.scene.objects[0].color)
        for t, s in zip(things, some, strict=True)
    ]
    assert np.mean(right) > 0.98
    assert detect(np.full((1, 32, 32, 3), 170, np.uint8)) == [[]]


def test_scores_of_perfect_and_of_empty_pictures():
    prompts = suite(5, seed=3)
    assert [p.caption for p in prompts] == [p.caption for p in suite(5, seed=3)]
    assert Counter(p.scene.task for p in prompts) == dict.fromkeys(TASKS, 5)
    nothing = score(np.full((len(prompts), 32, 32, 3), 128, np.uint8), prompts)
    assert nothing["overall"] == 0 and nothing["single_object_color"]["accuracy"] == 0
    assert nothing["single_object_color"]["chance"] == pytest.approx(1 / 11)
