"""Short audio clips beside the hypotheses, so that the report can be listened to.

    <stage>/audio/<set>/<n>.mp3       one utterance
    <stage>/audio/<set>/clips.json    {utterance id: file name}

MP3, because every browser plays it and a second takes 4 kB.
"""

import json
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np


def choose_clips(errors: Sequence[int], count: int) -> list[int]:
    """Which utterances to make playable: half the worst ones, half spread evenly over the rest.

    Args:
      errors: errors of each utterance, [N].
      count: how many to choose at most.

    Returns:
      Positions in 0..N-1, most errors first.
    """
    order = sorted(range(len(errors)), key=lambda n: -errors[n])
    if len(order) <= count:
        return order
    worst = (count + 1) // 2
    rest, wanted = order[worst:], count - worst
    spread = [rest[n * len(rest) // wanted] for n in range(wanted)]
    return order[:worst] + spread


def write_clips(
    stage_directory: str | os.PathLike,
    set_name: str,
    ids: Sequence[str],
    read: Callable[[str], np.ndarray],
    sample_rate: int = 16000,
) -> pathlib.Path:
    """Writes the clips of one test set.

    Args:
      stage_directory: the evaluate stage's folder.
      set_name: the test set.
      ids: utterances to write.
      read: id -> int16 PCM [S], mono.
      sample_rate: of what `read` returns, in Hz.

    Returns:
      The clips' folder.
    """
    import soundfile

    folder = pathlib.Path(stage_directory) / 'audio' / set_name
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for number, name in enumerate(ids):
        names[name] = f'{number:04d}.mp3'
        soundfile.write(folder / names[name], read(name), sample_rate, format='MP3')
    temporary = folder / '.clips.json.tmp'
    temporary.write_text(json.dumps(names, indent=1))
    os.replace(temporary, folder / 'clips.json')
    return folder
