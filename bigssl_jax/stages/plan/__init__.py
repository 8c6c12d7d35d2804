"""`bigssl plan`: what a stage will cost on a pod, from the TPU compiler, with no TPU.

step.py          config, mesh  ->  the stage's own jitted step, its arguments described
compilation.py   ->  compiled for devices that are only described, or refused for lack of memory
price.py         ->  FLOPs, bytes and bounds: the Plan
search.py        which batch fits, which combinations to try: arithmetic, nothing is compiled
options.py       the largest batch, remedies for a plan that does not fit, the best combination
table.py         for people
command.py       the verb
"""

from bigssl_jax.stages.plan.command import plan, plan_command
from bigssl_jax.stages.plan.price import Plan

__all__ = ['Plan', 'plan', 'plan_command']
