"""Parameters of an earlier stage are taken by name and shape; what was taken is reported."""

import jax
import numpy as np
import pytest

from bigssl_jax.config import UserError
from bigssl_jax.training.initialise import take_matching


def fresh():
    return jax.tree.map(
        jax.numpy.asarray,
        {
            'blocks': {'kernel': np.zeros((2, 3), np.float32), 'bias': np.zeros(3, np.float32)},
            'norm': {'scale': np.ones(3, np.float32)},
        },
    )


def test_same_names_are_taken_new_ones_stay_fresh_old_ones_are_dropped():
    earlier = {
        'blocks': {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)},
        'norm': {'scale': np.full(3, 7, np.float32)},
        'old': {'kernel': np.ones(2, np.float32)},
    }
    mixed, matching = take_matching(fresh(), earlier)
    np.testing.assert_array_equal(mixed['blocks']['kernel'], earlier['blocks']['kernel'])
    np.testing.assert_array_equal(mixed['norm']['scale'], 7)
    np.testing.assert_array_equal(mixed['blocks']['bias'], 0)
    assert matching.matched == ('blocks/kernel', 'norm/scale')
    assert matching.new == ('blocks/bias',)
    assert matching.dropped == ('old/kernel',)
    assert str(matching) == '2 matched, 1 new, 1 dropped'


def test_dtype_and_place_are_those_of_the_fresh_parameters():
    start = fresh()
    earlier = {'norm': {'scale': np.full(3, 0.1, np.float64)}}
    mixed, _ = take_matching(start, earlier)
    assert mixed['norm']['scale'].dtype == np.float32
    assert mixed['norm']['scale'].sharding == start['norm']['scale'].sharding


def test_a_change_of_shape_names_the_parameter_and_both_shapes():
    with pytest.raises(UserError, match=r'blocks/kernel has shape \(2, 4\).*\(2, 3\) here'):
        take_matching(fresh(), {'blocks': {'kernel': np.zeros((2, 4))}})


def test_nothing_in_common_is_an_error():
    with pytest.raises(UserError, match='no parameter'):
        take_matching(fresh(), {'decoder': {'kernel': np.zeros(2)}})
