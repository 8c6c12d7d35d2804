"""Makes a label set together with whoever else is at it.

    look -> take a part -> make it -> write it, read it back -> look -> ...
                 `-- none left: all verified -> take the whole set -> finish it
                     none left: others have them in hand -> wait, look again

Every worker does this loop and sees only the folder.  Whether a worker works alone, beside others,
after one was killed or a second time, the files are the same.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from bigssl_jax.data.errors import DataError
from bigssl_jax.data.label_ledger import SET, Ledger, item_of
from bigssl_jax.data.label_sets import DamagedParts, LabelSet, LabelWriter


def complete(
    writer: LabelWriter,
    ledger: Ledger,
    make: Callable[[int], Mapping[str, Any]],
    look: Callable[[int], None] = lambda verified: None,
    **finish: Any,
) -> LabelSet:
    """Works on a label set until it is complete; each part is made by one worker.

    Args:
      writer: of the set.
      ledger: the claims on its parts.
      make: part -> arguments of `writer.write`: columns, quarantine.  What it raises ends this
        worker, and the part is free for others at once.
      look: called with the number of verified parts at every turn, also while all that is left is
        in others' hands; may raise.
      finish: arguments of `writer.finish`.

    Raises:
      DataError: the folder cannot be written, or holds another teacher's labels.
    """
    while not writer.is_complete():
        todo = {item_of(part): part for part in writer.unverified()}
        look(writer.num_parts - len(todo))
        claim = ledger.take([*todo] or [SET])
        if claim is None:
            time.sleep(ledger.poll_seconds)
            continue
        with claim:
            if claim.item == SET:
                _finish(writer, ledger, finish)
            elif not _make_part(writer, todo[claim.item], make, claim.is_mine):
                continue
            claim.done()
    look(writer.num_parts)
    ledger.clear()
    return LabelSet.open(writer.directory)


def _make_part(
    writer: LabelWriter,
    part: int,
    make: Callable[[int], Mapping[str, Any]],
    is_mine: Callable[[], bool],
) -> bool:
    """Makes a part unless it is there by now; False: it was another's when it was ready."""
    if writer.settle(part):
        return True
    started = time.monotonic()
    made = make(part)
    if not is_mine():
        return False  # this worker was stopped for longer than its lease
    try:
        writer.write(part, work_seconds=time.monotonic() - started, **made)
    except DataError:
        if not writer.is_complete():  # then others were quicker, and have tidied up
            raise
    return True


def _finish(writer: LabelWriter, ledger: Ledger, arguments: Mapping[str, Any]) -> None:
    if writer.is_complete():
        return
    try:
        writer.finish(**arguments)
    except DamagedParts:
        pass  # set aside and told: they are taken like any other part
