"""The verb `bigssl plan`: config and topology names in, Plans and tables out."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bigssl_jax.config import ConfigError, choose
from bigssl_jax.parallel.topologies import topology, topology_devices
from bigssl_jax.stages import schema
from bigssl_jax.stages.plan.compilation import cache_directory
from bigssl_jax.stages.plan.options import Found, find_largest, remedies, search
from bigssl_jax.stages.plan.price import Plan, Question, Report, plan_question
from bigssl_jax.stages.plan.step import plannable_stages, stage_batches

EXTENTS = ('quick', 'usual', 'search')


def plan(config: Any, topology_name: str, stage: str | None = None) -> Plan:
    """What a stage of an experiment costs on a topology, as it is configured.

    `parallel.topologies.configure_ahead_of_time` has to be called before JAX starts a backend.

    Args:
      config: an experiment, resolved or not.
      topology_name: such as 'v5e-256' or '2xv5e-256'.
      stage: default: the first stage of the recipe that can be planned.

    Raises:
      UserError: unknown names, a mesh or a batch that does not come out even, no libtpu.
    """
    resolved = schema.resolve(config)
    name = plannable_stages(resolved, stage)[0]
    return plan_question(next(_questions(resolved, [topology_name], [name], lambda text: None)))


def plan_command(
    config: Any,
    topologies: str,
    stage: str | None = None,
    extent: str = 'usual',
) -> dict[str, Any]:
    """Plans stages on topologies, prints the tables and returns them as plain data.

    Args:
      config: an experiment.
      topologies: names with commas between.
      stage: only this one; default: every stage of the recipe that can be planned.
      extent: 'quick' compiles what is configured; 'usual' also looks for the largest batch that
        fits, or for remedies if the plan does not; 'search' also for the best of batch x remat x
        mesh.

    Raises:
      UserError: as in `plan`; everything is checked before the first compilation.
    """
    from bigssl_jax.stages.plan.table import print_found, print_plan, print_summary, progress

    choose('extent', extent, EXTENTS)
    resolved = schema.resolve(config)
    names = [name.strip() for name in topologies.split(',') if name.strip()]
    if not names:
        raise ConfigError("--topology is empty; name a slice, such as 'v5e-256'")
    plans: list[Plan] = []
    found: dict[str, list[Found]] = {}
    with progress() as shown:
        stages = plannable_stages(resolved, stage)
        for question in list(_questions(resolved, names, stages, shown.say)):
            made = plan_question(question)
            if extent != 'quick':
                made = _with_options(question, made)
            shown.clear()
            print_plan(made)
            plans.append(made)
            if extent == 'search':
                shown.start_search()
                found[f'{made.stage} on {made.topology}'] = items = search(question, shown.searched)
                shown.clear()
                print_found(made, items)
    if len(plans) > 1:
        print_summary(plans)
    return {
        'plans': [made.to_json() for made in plans],
        'search': {
            where: [{'changes': dict(f.changes), **f.plan.to_json()} for f in items]
            for where, items in found.items()
        },
    }


def _questions(
    config: Mapping[str, Any], topologies: Sequence[str], stages: Sequence[str], report: Report
) -> Iterator[Question]:
    """Every stage on every topology, all checked before the first is yielded."""
    slices = [topology(name) for name in topologies]
    cache = cache_directory(config)
    questions = []
    for where in slices:
        devices = topology_devices(where)
        for stage in stages:
            question = Question(config, stage, where, devices, cache, report)
            stage_batches(config, stage, question.mesh())
            questions.append(question)
    yield from questions


def _with_options(question: Question, made: Plan) -> Plan:
    """The plan with the largest batch that fits, or with remedies when it does not fit itself."""
    if not made.fits:
        return dataclasses.replace(made, remedies=remedies(question))
    largest = find_largest(question, made)
    assert largest is not None, 'the configured batch fits'
    return dataclasses.replace(made, largest=largest[0])
