"""How TensorFlow starts: without a word, and without the accelerators, which belong to JAX.

Everything here that needs TensorFlow, TFDS or seqio asks for `tensorflow()` first.  A context that
has begun without that takes the whole memory of every GPU for good, and JAX finds none left.

TensorFlow remarks on CUDA from C++, when it is imported and when it first counts devices, before it
has read TF_CPP_MIN_LOG_LEVEL.  So the file descriptor of standard error is held meanwhile, and
everything but these remarks is passed on.
"""

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Iterator

# On a machine without a GPU: nothing is wrong, and nothing follows for the reader of the log.
REMARKS = (
    b'All log messages before absl::InitializeLog() is called are written to STDERR',
    b'Could not find cuda drivers on your machine, GPU will not be used',
    b'failed call to cuInit',
)


@functools.lru_cache(maxsize=1)
def tensorflow():
    """The tensorflow module, started."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
    with without_remarks():
        import tensorflow as tf

        for kind in ('GPU', 'TPU'):
            tf.config.set_visible_devices([], kind)
    return tf


@contextlib.contextmanager
def without_remarks() -> Iterator[None]:
    """Holds what the whole process writes to standard error; at the end passes on the rest."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        original = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)
            held.seek(0)
            for line in held:
                if not any(remark in line for remark in REMARKS):
                    os.write(2, line)
