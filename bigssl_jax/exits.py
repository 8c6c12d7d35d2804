"""How the `bigssl` command ends: exit codes, and what is said of an error.

  0    done
  1    a defect of ours: the traceback says where
  2    something the user can mend, said in one line on standard error
  75   asked to stop (SIGTERM, Ctrl-C) in training: state saved, the same command continues
  76   another process of this run has ended unexpectedly: start all of them again
  77   a step hung (compute.watchdog_minutes): the stage's stacks-*.txt say where
  130  Ctrl-C outside training, 143 SIGTERM outside training: the same command continues

Several processes of one run end with the code of the one that ended first (parallel/peers.py).
"""

from bigssl_jax.config import UserError
from bigssl_jax.training.disk import MENDABLE
from bigssl_jax.training.signals import STOPPED_EXIT_CODE, Stopped

EXIT_DEFECT = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = STOPPED_EXIT_CODE
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


def exit_of(error: BaseException) -> tuple[int, str]:
    """The exit code of what ended a verb, and the line to say; '' for a defect of ours."""
    if isinstance(error, UserError):
        return EXIT_USER_ERROR, str(error)
    if isinstance(error, Stopped):
        return EXIT_STOPPED, str(error)
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, 'interrupted; the same command continues'
    if isinstance(error, SystemExit):
        return int(error.code or 0), 'asked to stop; the same command continues'
    if isinstance(error, OSError) and error.errno in MENDABLE:
        return EXIT_USER_ERROR, f'{error.filename or "writing"}: {error.strerror}'
    return EXIT_DEFECT, ''
