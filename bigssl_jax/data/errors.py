"""What the data room raises. Everything here is a `UserError`: one line for a person, exit code 2.

`DataError` is anything wrong with files on disk: manifests, corpora, label sets, shards.
`BadAudio` is one utterance that cannot be used. It carries a short reason code, so that preparation
can put the utterance aside (quarantine) and count reasons instead of stopping.
"""

from __future__ import annotations

from bigssl_jax.config import UserError

# Every reason for which an utterance can be put aside, with the sentence shown to people.
REASONS = {
    'missing': 'the audio file does not exist',
    'unreadable': 'the file is no audio that can be decoded',
    'empty': 'the file holds no samples',
    'truncated': 'the file ends before its header, or the asked cut, says',
    'bad_cut': 'the offset lies past the end of the file',
    'not_finite': 'the samples hold NaN or infinity',
    'too_short': 'shorter than the shortest accepted utterance',
    'too_long': 'longer than the longest accepted utterance',
    'silent': 'no sample rises above silence',
    'clipped': 'too many samples stand at full scale',
}


class DataError(UserError):
    """A file or folder of the user's is wrong; the message names it and says what to do."""


class BadAudio(DataError):
    """One utterance cannot be used.

    Attributes: `reason`, a key of `REASONS`; `detail`, what was found, with the numbers.
    """

    def __init__(self, reason: str, detail: str, source: str = '') -> None:
        assert reason in REASONS, reason
        self.reason = reason
        self.detail = detail
        self.source = source
        super().__init__(f'{source}: {reason}: {detail}' if source else f'{reason}: {detail}')

    def __reduce__(self):  # exceptions with several arguments do not pickle by themselves
        return BadAudio, (self.reason, self.detail, self.source)
