"""Texts by hand, in the forms that the compilers write: loops, groups, fusions, memory spaces."""

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from bigssl_jax.parallel import hlo
from bigssl_jax.parallel.collectives import bytes_by_axes, collectives, device_groups
from bigssl_jax.parallel.hbm import hbm_bytes

MESH = AbstractMesh((2, 4), ('data', 'fsdp'))
GATHER = 'replica_groups=[2,4]<=[8], dimensions={0}'

# A loop whose first turn the compiler has taken out: the counter runs from 1 in steps of 1 to 6.
# The step is carried along in the loop's tuple.
PEELED = """
HloModule m, is_scheduled=true, num_partitions=8

%inner (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %g = f32[16,8]{1,0:T(8,128)S(1)} all-gather(%x), channel_id=1, GROUPS, metadata={op_name="f"}
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%next, %x)
}, execution_thread="sparsecore"

%inner_condition (p.1: (s32[], f32[4,8])) -> pred[] {
  %p.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant(3)
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

%outer (q: (s32[], f32[4,8], /*index=2*/s32[])) -> (s32[], f32[4,8], s32[]) {
  %q = (s32[], f32[4,8]{1,0}, /*index=2*/s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %y = f32[4,8]{1,0} get-tuple-element(%q), index=1
  %step = s32[] get-tuple-element(%q), index=2
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}) tuple(%zero, %y)
  %loop = (s32[], f32[4,8]{1,0}) while(%start), condition=%inner_condition, body=%inner
  %z = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  %j.copy = s32[] copy(%j)
  %j.next = s32[] add(%j.copy, %step)
  ROOT %u = (s32[], f32[4,8]{1,0}, s32[]) tuple(%j.next, %z, %step)
}

%outer_condition (q.1: (s32[], f32[4,8], /*index=2*/s32[])) -> pred[] {
  %q.1 = (s32[], f32[4,8]{1,0}, /*index=2*/s32[]) parameter(0)
  %j.1 = s32[] get-tuple-element(%q.1), index=0
  %limit.1 = s32[] constant(6)
  ROOT %lt.1 = pred[] compare(%j.1, %limit.1), direction=LT
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %first = s32[] constant(1)
  %first.copy = s32[] copy(%first)
  %begin = (s32[], f32[4,8]{1,0}, s32[]) tuple(%first.copy, %a, %first)
  %turns = (s32[], f32[4,8]{1,0}, s32[]) while(%begin), condition=%outer_condition, body=%outer
  ROOT %r = f32[4,8]{1,0} get-tuple-element(%turns), index=1
}
""".replace('GROUPS', GATHER)


def test_nested_loops_multiply_and_a_peeled_loop_turns_once_less():
    program = hlo.parse(PEELED)
    counts = hlo.execution_counts(program)
    assert counts == {'main': 1, 'outer': 5, 'outer_condition': 5, 'inner': 15} | {
        'inner_condition': 15
    }
    (gather,) = collectives(PEELED, MESH)
    assert (gather.operation, gather.axes, gather.dtype) == ('all-gather', ('fsdp',), 'f32')
    assert (gather.count, gather.group_size, gather.source) == (15, 4, 'f')
    assert gather.bytes_per_device == 15 * 3 * (4 * 8 * 4)


def test_a_loop_that_nobody_can_count_runs_once_and_is_named():
    text = PEELED.replace(
        'compare(%j.1, %limit.1), direction=LT', 'compare(%j.1, %j.1), direction=NE'
    )
    program = hlo.parse(text)
    assert hlo.unknown_loops(program) == ['turns']
    assert hlo.execution_counts(program)['inner'] == 3
    assert hlo.execution_counts(program, 5)['inner'] == 15
    known = text.replace(
        'body=%outer', 'body=%outer, backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert hlo.execution_counts(hlo.parse(known))['inner'] == 21


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match='ENTRY'):
        hlo.parse('HloModule nothing')
    with pytest.raises(ValueError, match='not an instruction'):
        hlo.parse('ENTRY %m (a: f32[]) -> f32[] {\n  what is this\n}\n')


@pytest.mark.parametrize(
    ('attributes', 'groups'),
    [
        ('replica_groups={{0,1},{2,3}}, x', [[0, 1], [2, 3]]),
        ('replica_groups={}, x', [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ('replica_groups=[2,4]<=[8], x', [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ('replica_groups=[2,4]<=[4,2]T(1,0), x', [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}, x", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}, x", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        ('source_target_pairs={{0,1},{1,0},{2,2}}, x', [[0, 1], [1, 0]]),
        ('source_target_pairs={}, backend_config={"a":{"b":{}}}', np.zeros((0, 2))),
    ],
)
def test_groups_in_all_the_ways_that_they_are_written(attributes, groups):
    np.testing.assert_array_equal(device_groups(attributes, 8), groups)


def test_groups_of_an_unknown_form_are_an_error():
    with pytest.raises(ValueError, match='known form'):
        device_groups('replica_groups=what', 8)


def entry(*lines, before=''):
    """A program of the given instructions."""
    return before + '\nENTRY %main (a: f32[]) -> f32[] {\n  ' + '\n  '.join(lines) + '\n}\n'


@pytest.mark.parametrize(
    ('instruction', 'axes', 'sent'),
    [
        ('f32[8,4]{1,0} all-reduce(%a), replica_groups=[2,4]<=[8]', ('fsdp',), 2 * 3 / 4 * 128),
        ('f32[8,4]{1,0} all-reduce(%a), replica_groups=[4,2]<=[2,4]T(1,0)', ('data',), 128),
        ('f32[8,4]{1,0} all-reduce(%a), replica_groups={}', ('data', 'fsdp'), 2 * 7 / 8 * 128),
        ('f32[2,4]{1,0} reduce-scatter(%a), replica_groups=[2,4]<=[8]', ('fsdp',), 3 / 4 * 128),
        ('f32[8,4]{1,0} all-to-all(%a), replica_groups=[2,4]<=[8]', ('fsdp',), 3 / 4 * 128),
        ('f32[32,4]{1,0} all-gather(%a), replica_groups=[2,4]<=[8]', ('fsdp',), 3 * 128),
        (
            'f32[8,4]{1,0} collective-permute(%a), source_target_pairs={{0,4},{4,0}}',
            ('data',),
            128,
        ),
    ],
)
def test_ring_bytes_by_hand(instruction, axes, sent):
    text = entry('%a = f32[8,4]{1,0} parameter(0)', f'ROOT %r = {instruction}')
    (found,) = collectives(text, MESH)
    assert (found.axes, found.bytes_per_device) == (axes, sent)
    assert bytes_by_axes([found, found]) == {axes: 2 * sent}


def test_a_collective_of_one_device_moves_nothing():
    text = entry(
        '%a = f32[8,4]{1,0} parameter(0)',
        '%b = f32[8,4]{1,0} collective-permute(%a), source_target_pairs={{0,0},{1,1}}',
        'ROOT %r = f32[8,4]{1,0} all-reduce(%b), replica_groups=[8,1]<=[8]',
    )
    assert collectives(text, MESH) == []


def test_start_and_done_are_one_collective():
    text = entry(
        '%a = bf16[8,4]{1,0} parameter(0)',
        '%s = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%a), channel_id=1, ' + GATHER,
        'ROOT %r = bf16[32,4]{1,0} all-gather-done(%s)',
    )
    (found,) = collectives(text, MESH)
    assert (found.operation, found.bytes_per_device, found.dtype) == ('all-gather', 3 * 64, 'bf16')


SCATTER = """
%all-reduce-scatter.1 (i: bf16[8,4], k: bf16[4,8]) -> (bf16[2,4], bf16[1,8]) {
  %i = bf16[8,4]{1,0} parameter(0)
  %k = bf16[4,8]{1,0} parameter(1)
  %all = (bf16[8,4]{1,0}, bf16[4,8]{1,0}) all-reduce(%i, %k), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
  %first = bf16[8,4]{1,0} get-tuple-element(%all), index=0
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  %mine = bf16[2,4]{1,0} dynamic-slice(%first, %id, %zero), dynamic_slice_sizes={2,4}
  %second = bf16[4,8]{1,0} get-tuple-element(%all), index=1
  %mine.2 = bf16[1,8]{1,0} dynamic-slice(%second, %id, %zero), dynamic_slice_sizes={1,8}
  ROOT %t = (bf16[2,4]{1,0}, bf16[1,8]{1,0}) tuple(%mine, %mine.2)
}
"""  # noqa: E501


def test_an_all_reduce_of_which_only_slices_are_kept_is_a_reduce_scatter():
    lines = (
        '%a = bf16[8,4]{1,0} parameter(0)',
        '%b = bf16[4,8]{1,0} parameter(1)',
        'ROOT %r = (bf16[2,4]{1,0}, bf16[1,8]{1,0}) fusion(%a, %b), kind=kCustom,'
        ' calls=%all-reduce-scatter.1, metadata={op_name="g"}',
    )
    (found,) = collectives(entry(*lines, before=SCATTER), MESH)
    assert (found.operation, found.axes, found.source) == ('reduce-scatter', ('fsdp',), 'g')
    assert found.bytes_per_device == 3 / 4 * (64 + 64)
    kept = SCATTER.replace('tuple(%mine, %mine.2)', 'tuple(%mine, %second)')
    (found,) = collectives(entry(*lines, before=kept), MESH)
    assert found.operation == 'all-reduce'
    # Outside of a fusion the whole sum is made, whatever becomes of it.
    body = SCATTER.strip().splitlines()[1:-1]
    (found,) = collectives(entry(*(line.strip() for line in body)), MESH)
    assert found.operation == 'all-reduce'


CHAIN = """
%begin (p: bf16[8,4]) -> (bf16[8,4], bf16[32,4]) {
  %p = bf16[8,4]{1,0} parameter(0)
  %g.1 = bf16[32,4]{1,0} all-gather(%p), channel_id=6, GROUPS, frontend_attributes={chain_id="0"}
  ROOT %c = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) custom-call(%g.1), target="AsyncCollectiveStart"
}

%end (p.1: bf16[8,4], p.2: bf16[32,4]) -> bf16[32,4] {
  %p.1 = bf16[8,4]{1,0} parameter(0)
  %p.2 = bf16[32,4]{1,0} parameter(1)
  %g.2 = bf16[32,4]{1,0} all-gather(%p.1), channel_id=6, GROUPS, frontend_attributes={chain_id="0"}
  ROOT %c.1 = bf16[32,4]{1,0} custom-call(%p.1, %p.2, %g.2), target="AsyncCollectiveDone"
}
""".replace('GROUPS', GATHER)
IN_CHAIN = (
    '%a = bf16[8,4]{1,0} parameter(0)',
    '%s = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) fusion(%a), kind=kCustom, calls=%begin',
    '%x = bf16[8,4]{1,0} get-tuple-element(%s), index=0',
    '%y = bf16[32,4]{1,0} get-tuple-element(%s), index=1',
    'ROOT %r = bf16[32,4]{1,0} fusion(%x, %y), kind=kCustom, calls=%end',
)


def test_the_fusions_of_an_asynchronous_collective_hold_it_once():
    (found,) = collectives(entry(*IN_CHAIN, before=CHAIN), MESH)
    assert (found.operation, found.bytes_per_device) == ('all-gather', 3 * 64)


def test_a_send_between_slices_is_the_collective_that_it_says():
    mesh = AbstractMesh((2, 1, 4), ('slice', 'data', 'fsdp'))
    text = entry(
        '%a = bf16[8,4]{1,0} parameter(0)',
        '%token = token[] after-all()',
        '%s = (bf16[8,4]{1,0}, u32[], token[]) send(%a, %token), channel_id=2,'
        ' is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}',
        'ROOT %r = bf16[8,4]{1,0} all-reduce(%a), channel_id=3, replica_groups={{0,1,2,3}}',
    )
    between, within = sorted(collectives(text, mesh), key=lambda found: found.axes, reverse=True)
    assert (between.operation, between.axes) == ('all-reduce', ('slice',))
    assert between.bytes_per_device == 2 * 1 / 2 * 64
    # The groups name the devices of one slice only.
    assert (within.axes, within.bytes_per_device) == (('fsdp',), 2 * 3 / 4 * 64)


def test_a_permutation_between_slices_sends_its_operand_once():
    mesh = AbstractMesh((2, 4), ('slice', 'fsdp'))
    text = entry(
        '%a = bf16[8,4]{1,0} parameter(0)',
        '%token = token[] after-all()',
        'ROOT %s = (bf16[8,4]{1,0}, u32[], token[]) send(%a, %token), channel_id=2,'
        ' is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ONE_TO_ONE"}',
    )
    (found,) = collectives(text, mesh)
    assert (found.operation, found.axes) == ('collective-permute', ('slice',))
    assert found.bytes_per_device == 64


FUSED = """
%body (p0: bf16[6,8,4], p1: s32[], p2: f32[6,2,4], p3: f32[8,4]) -> (f32[8,4], f32[6,2,4]) {
  %p0 = bf16[6,8,4]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[6,2,4]{2,1,0} parameter(2)
  %p3 = f32[8,4]{1,0} parameter(3)
  %zero = s32[] constant(0)
  %w = bf16[1,8,4]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,4}
  %v = f32[8,4]{1,0} convert(%w)
  %sum = f32[8,4]{1,0} add(%v, %p3)
  %part = f32[1,2,4]{2,1,0} slice(%sum), slice={[0:2], [0:4]}
  %new = f32[6,2,4]{2,1,0} dynamic-update-slice(%p2, %part, %p1, %zero, %zero)
  ROOT %t = (f32[8,4]{1,0}, f32[6,2,4]{2,1,0}) tuple(%sum, %new)
}
"""


def test_hbm_of_a_fusion_counts_slices_and_updates_in_place():
    text = entry(
        '%a = bf16[6,8,4]{2,1,0} parameter(0)',
        '%i = s32[]{:S(6)} parameter(1)',
        '%b = f32[6,2,4]{2,1,0} parameter(2)',
        '%c = f32[8,4]{1,0:T(8,128)S(1)} parameter(3)',
        'ROOT %r = (f32[8,4]{1,0}, f32[6,2,4]{2,1,0}) fusion(%a, %i, %b, %c), kind=kLoop,'
        ' calls=%body',
        before=FUSED,
    )
    # The slice of %a; %c is in fast memory; the sum; the updated part of %b.
    assert hbm_bytes(text) == 8 * 4 * 2 + 8 * 4 * 4 + 2 * 4 * 4


def test_hbm_of_copies_between_memories_and_of_collectives():
    text = entry(
        '%a = f32[8,4]{1,0} parameter(0)',
        '%s = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%a)',
        '%fast = f32[8,4]{1,0:S(1)} copy-done(%s)',
        '%p = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a)',
        '%part = f32[2,4]{1,0:S(1)} slice-done(%p)',
        'ROOT %r = f32[32,4]{1,0} all-gather(%fast), ' + GATHER,
    )
    assert hbm_bytes(text) == 8 * 4 * 4 + 2 * 4 * 4 + 32 * 4 * 4


def test_hbm_of_an_asynchronous_collective_is_counted_at_its_start():
    assert hbm_bytes(entry(*IN_CHAIN, before=CHAIN)) == 64 + 256
