"""Audio of one batch by tf.data, from shard to padded array, without a Python operation.

For each utterance `TFRecordDatasetV2` opens its shard at the record's byte offset and takes one
record; the records are batched and unpacked to int16. The graph is traced once, knows no shapes,
and runs outside Python's interpreter lock. There is no long-lived iterator: nothing to checkpoint,
and nothing that could hang when the process exits.
"""

import functools

import numpy as np

from bigssl_jax.data.errors import DataError
from bigssl_jax.data.tensorflow_start import tensorflow


def record_dataset(path, offset):
    """A tf.data.Dataset of the one record that starts at `offset` (int64) of the shard `path`."""
    tf = tensorflow()
    # No public function turns the raw operation's variant into a Dataset.
    from tensorflow.python.data.ops import dataset_ops

    variant = tf.raw_ops.TFRecordDatasetV2(
        filenames=[path],
        compression_type='',
        buffer_size=tf.constant(0, tf.int64),
        byte_offsets=[offset],
    )
    return dataset_ops._VariantDataset(variant, tf.TensorSpec([], tf.string)).take(1)


@functools.lru_cache(maxsize=1)
def _graph():
    tf = tensorflow()

    def read(paths, offsets, samples):
        dataset = tf.data.Dataset.from_tensor_slices((paths, offsets)).flat_map(record_dataset)
        dataset = dataset.batch(tf.size(paths, tf.int64))
        records = dataset.get_single_element()
        audio = tf.raw_ops.DecodePaddedRaw(
            input_bytes=records, fixed_length=2 * samples, out_type=tf.int16
        )
        return audio, tf.strings.length(records)

    return tf.function(
        read,
        autograph=False,
        input_signature=[
            tf.TensorSpec([None], tf.string),
            tf.TensorSpec([None], tf.int64),
            tf.TensorSpec([], tf.int32),
        ],
    )


def read_audio_batch(
    paths: list[str], offsets: np.ndarray, sample_counts: np.ndarray, samples: int
) -> np.ndarray:
    """Zero-padded audio of some records: int16 [N, samples].

    Args:
      paths: the shard of each record [N], N >= 1.
      offsets: first byte of each record in its shard, int64 [N].
      sample_counts: samples that each record must hold, at most `samples` [N].
      samples: S.

    Raises:
      DataError: a shard is missing, cut short, or holds something else.
    """
    tf = tensorflow()
    try:
        audio, sizes = _graph()(
            tf.constant(paths), tf.constant(offsets, tf.int64), tf.constant(samples, tf.int32)
        )
    except tf.errors.OpError as error:
        reason = error.message.strip().splitlines()[0] if error.message else type(error).__name__
        raise DataError(f'audio cannot be read ({reason}): verify the corpus') from None
    sizes = sizes.numpy()
    if sizes.size != len(paths) or np.any(sizes != 2 * np.asarray(sample_counts)):
        raise DataError('records do not have the lengths that the index says: verify the corpus')
    return audio.numpy()
