"""What the machine refuses, a full or read-only disk or a missing permission, said in one line.

Python gives an OSError with a number.  TensorStore gives a ValueError with the number in its text,
and Orbax raises that again in another thread, so the text is what there is to go by.
"""

import contextlib
import errno
import logging
import os
import pathlib
import warnings
from collections.abc import Iterator

from bigssl_jax.config import UserError

# Conditions of the machine, not of the program.
MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def refusal(error: BaseException | None) -> str | None:
    """What the machine refused, where an error or its cause says so; else None."""
    while error is not None:
        for number in MENDABLE:
            if getattr(error, 'errno', None) == number or f"os_error_code='{number}'" in str(error):
                return os.strerror(number)
        error = error.__cause__
    return None


@contextlib.contextmanager
def writing(what: str, where: pathlib.Path, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turns a refusal of the machine within the block into one line.

    Args:
      what: is written, for the line.
      where: the file or folder.
      kind: the error to raise.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        # Orbax leaves what it was about to do; at the exit Python would say so after our line.
        warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
        logging.getLogger('asyncio').setLevel(logging.CRITICAL + 1)
        raise kind(
            f'cannot write {what} to {where}: {reason}; mend that, and the same command continues'
        ) from error
