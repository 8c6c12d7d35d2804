"""The algebra of spaces against itertools; names that are unique, stable and fit a file system."""

import itertools
import random
import re

import numpy as np
import pytest

from bigssl_jax.config import ConfigError
from bigssl_jax.sweeps import (
    chain,
    check_space,
    point_names,
    product,
    short_names,
    sweep,
    varied_paths,
    zip_,
)


def random_space(generator: random.Random, prefix: str, depth: int) -> tuple[list, list]:
    """A space made by our words, and the same made by itertools over sets of pairs."""
    kind = generator.choice(['sweep', 'product', 'zip', 'chain']) if depth else 'sweep'
    if kind == 'sweep':
        values = [generator.choice([1, 2.5, 'x', None, (1, 2)]) for _ in range(3)]
        values = values[: generator.randint(1, 3)]
        return sweep(prefix, values), [{(prefix, value)} for value in values]
    parts = [random_space(generator, f'{prefix}.p{i}', depth - 1) for i in range(2)]
    ours, theirs = [part[0] for part in parts], [part[1] for part in parts]
    if kind == 'product':
        return product(*ours), [set().union(*some) for some in itertools.product(*theirs)]
    if kind == 'chain':
        return chain(*ours), list(itertools.chain(*theirs))
    shortest = min(map(len, ours))
    ours = [space[:shortest] for space in ours]
    return zip_(*ours), [set().union(*some) for some in zip(*theirs, strict=False)]


@pytest.mark.parametrize('seed', range(40))
def test_spaces_are_what_itertools_makes_of_sets_of_pairs(seed):
    ours, theirs = random_space(random.Random(seed), 'f', 3)
    assert [set(point.items()) for point in ours] == theirs
    assert len(ours) > 0


def test_the_example_of_the_head_of_the_module():
    space = product(
        sweep('peak', [1e-3, 2e-3]),
        zip_(sweep('encoder.preset', ['tiny', 'small']), sweep('seed', [0, 1])),
    )
    assert space == [
        {'peak': peak, 'encoder.preset': preset, 'seed': seed}
        for peak in (1e-3, 2e-3)
        for preset, seed in (('tiny', 0), ('small', 1))
    ]


def test_the_parts_of_a_space_are_left_as_they_are():
    part = sweep('a', [1, 2])
    chain(part)[0]['a'] = 3
    product(part, sweep('b', [1]))
    assert part == [{'a': 1}, {'a': 2}]
    assert product() == [{}]


def test_values_of_numpy_become_those_of_python():
    points = sweep('x', np.logspace(-3, -1, 3)) + sweep('x', [np.int64(3), np.bool_(True)])
    assert [type(point['x']) for point in points] == [float, float, float, int, bool]
    assert sweep('x', [[np.float64(1), [2]]]) == [{'x': (1.0, (2,))}]
    assert sweep('x', range(2)) == [{'x': 0}, {'x': 1}]


@pytest.mark.parametrize(
    ('make', 'told'),
    [
        (lambda: sweep('seed', []), "sweep('seed', ...) has no values"),
        (lambda: sweep('seed', 'abc'), 'give a list of values'),
        (lambda: sweep('seed', 3), 'give a list of values'),
        (lambda: sweep('a..b', [1]), 'name a config field'),
        (lambda: sweep('a b', [1]), 'name a config field'),
        (lambda: sweep('seed', [object()]), '(object) is not a value of a config'),
        (lambda: product(sweep('a', [1]), sweep('a', [2])), 'a is swept twice'),
        (lambda: zip_(sweep('a', [1]), sweep('b', [2, 3])), 'zip_ of spaces with [1, 2] points'),
        (lambda: product({'a': 1}), 'is not a list of points'),
        (lambda: chain('abc'), 'is not a list of points'),
        (lambda: check_space(None), 'is not a list of points'),
        (lambda: check_space([]), 'no points'),
    ],
)
def test_what_is_no_space_is_one_line(make, told):
    with pytest.raises(ConfigError) as error:
        make()
    assert told in str(error.value)


def test_labels_are_as_short_as_they_can_be_and_distinct():
    peak = 'stages.{}.optimizer.groups.{}.peak'
    assert short_names([peak.format('teacher', 'all'), 'seed']) == {
        peak.format('teacher', 'all'): 'peak',
        'seed': 'seed',
    }
    paths = [peak.format(*pair) for pair in itertools.product(('teacher', 'student'), ('x', 'y'))]
    labels = short_names([*paths, 'a.b', 'b.b', 'b'])
    assert labels[paths[0]] == 'teacher.x.peak'
    assert len(set(labels.values())) == 7


def test_names_hold_the_number_and_what_differs():
    points = product(
        sweep('stages.a.peak', [1e-3, 0.5]), sweep('seed', [4]), sweep('corpus', ['/x/y z.jsonl'])
    )
    assert point_names(points) == ['000-peak_0.001', '001-peak_0.5']
    points = chain(sweep('encoder.preset', ['tiny', 'é/ü:*']), sweep('noise', [None, {'a': -1}]))
    assert point_names(points) == ['000-preset_tiny', '001-preset', '002-noise_None',
                                   '003-noise_a_-1']  # fmt: skip
    assert point_names([{'seed': 1}]) == ['000']


@pytest.mark.parametrize('seed', range(10))
def test_names_are_unique_stable_and_safe(seed):
    generator = random.Random(seed)
    values = ['a' * 200, '../..', 'x\ny', '', '-', '\0', 1e-30, -0.0, 10**40, True, ('a/b', 'c')]
    points = [
        {path: generator.choice(values) for path in ('a.b', 'c.b', 'argument')} for _ in range(50)
    ]
    names = point_names(points)
    assert len({name.lower() for name in names}) == 50
    assert names[:40] == point_names(points[:40])  # a space that grows at its end
    assert all(re.fullmatch(r'\d{3}[A-Za-z0-9_.+-]{0,77}', name) for name in names)


def test_points_that_lack_a_field_differ_from_those_that_have_it():
    points = chain(product(sweep('a', [1]), sweep('b', [1])), sweep('a', [1]))
    assert varied_paths(points) == ['b']
    assert point_names(points) == ['000-b_1', '001']
