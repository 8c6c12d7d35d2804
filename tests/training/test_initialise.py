"""The encoder of an earlier stage is taken by name and shape; what became of every name is said."""

import jax
import pytest

from bigssl_jax.config import UserError
from bigssl_jax.training.initialise import match_parameters, only


def shapes(encoder: dict, heads: dict) -> dict:
    """Abstract parameters, from nested dicts of shapes."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, 'float32'),
        {'encoder': encoder, 'heads': heads},
        is_leaf=lambda x: isinstance(x, tuple),
    )


HERE = shapes(
    {'blocks': {'kernel': (2, 3), 'bias': (3,)}, 'norm': {'scale': (3,)}},
    {'ctc': {'kernel': (3, 9)}},
)


def test_same_names_are_taken_new_ones_start_fresh_old_ones_are_dropped():
    earlier = shapes(
        {'blocks': {'kernel': (2, 3)}, 'norm': {'scale': (3,)}, 'old': {'kernel': (2,)}},
        {'best_rq': {'kernel': (3, 64)}},
    )
    matching = match_parameters(HERE, earlier)
    assert matching.matched == ('encoder/blocks/kernel', 'encoder/norm/scale')
    assert matching.new == ('encoder/blocks/bias', 'heads/ctc/kernel')
    assert matching.dropped == ('encoder/old/kernel', 'heads/best_rq/kernel')
    assert str(matching) == '2 matched, 2 new, 2 dropped'
    taken = only(HERE, matching.matched)
    assert taken == {
        'encoder': {
            'blocks': {'kernel': HERE['encoder']['blocks']['kernel']},
            'norm': {'scale': HERE['encoder']['norm']['scale']},
        }
    }


def test_a_head_of_the_same_name_is_not_taken():
    matching = match_parameters(HERE, HERE)
    assert matching.new == matching.dropped == ('heads/ctc/kernel',)


def test_a_change_of_shape_names_the_parameter_and_both_shapes():
    earlier = shapes({'blocks': {'kernel': (2, 4)}}, {})
    with pytest.raises(UserError, match=r'encoder/blocks/kernel has shape \(2, 4\).*\(2, 3\) here'):
        match_parameters(HERE, earlier)


def test_nothing_in_common_is_an_error():
    with pytest.raises(UserError, match='no parameter'):
        match_parameters(HERE, shapes({'decoder': {'kernel': (2,)}}, {'ctc': {'kernel': (3, 9)}}))


def test_named_heads_are_taken_too_and_whole():
    matching = match_parameters(HERE, HERE, ('ctc',))
    assert matching.new == matching.dropped == ()
    earlier = shapes({'blocks': {'kernel': (2, 3)}}, {'ctc': {'kernel': (3, 8)}})
    with pytest.raises(UserError, match=r'heads/ctc/kernel has shape \(3, 8\)'):
        match_parameters(HERE, earlier, ('ctc',))
    earlier = shapes({'blocks': {'kernel': (2, 3)}}, {'rnnt': {'kernel': (3, 9)}})
    with pytest.raises(UserError, match=r"init_heads names 'ctc', but .* heads/ctc/kernel"):
        match_parameters(HERE, earlier, ('ctc',))
