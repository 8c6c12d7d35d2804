"""Streams of text: the order, buckets and resuming of `stream.py`, without audio.

Batch k is a function of (text, seed, k) alone, and hosts take slices of it.  A batch is a dict of
numpy arrays (B rows of this host):

    labels         int32 [B, U]   token ids of a sentence, 0 padded
    label_counts   int32 [B]      0 marks a filler row
    word_counts    int32 [B]
    rows           int32 [B]      row in the global batch
    sources        int32 [B]      number of the source, in the order of names; -1 = filler
    utterances     int32 [B]      sentence of that source; -1 = filler
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bigssl_jax.config import ConfigError
from bigssl_jax.data.buckets import optimal_bounds
from bigssl_jax.data.order import ORDER_VERSION, Order
from bigssl_jax.data.plan import PassPlan, StreamPlan
from bigssl_jax.data.stream import Batch
from bigssl_jax.data.text_corpus import TextCorpus

_LABEL_STEP = 8  # U is a multiple of this
_BLOCK = 1 << 20


class _Lengths:
    """Tokens by sentence, read from the mapped index on demand."""

    def __init__(self, corpus: TextCorpus):
        self._corpus = corpus

    def __len__(self) -> int:
        return len(self._corpus)

    def __getitem__(self, index: Any) -> Any:
        return self._corpus.lengths(index)


class TextStream:
    """Batches of sentences, endless or finite.

    Args:
      sources: name -> (opened text, weight).
      fields: batch_tokens, num_buckets, rates ('weights': the weights are shares; 'proportional':
        they multiply the numbers of sentences).
      seed: of the order; None makes one pass, longest first.
      multiple_of: every batch size is a multiple of this.
      host, num_hosts: which slice of the global batches.

    Attributes:
      shapes: [(B, U)] of each bucket, for the global batch.
      num_batches: of a pass; None for an endless stream.
      excluded: {source: {reason: lines}}.
      fingerprint: hex; equal for streams that give equal global batches.
    """

    def __init__(
        self,
        sources: Mapping[str, tuple[TextCorpus, float]],
        fields: Mapping[str, Any],
        seed: int | None,
        multiple_of: int = 1,
        host: int = 0,
        num_hosts: int = 1,
    ):
        if not 0 <= host < num_hosts or multiple_of % num_hosts:
            raise ConfigError(
                f'host {host} of {num_hosts} hosts, batches of a multiple of {multiple_of} rows;'
                ' the multiple must divide by the hosts'
            )
        names = sorted(sources)
        self._corpora = [sources[name][0] for name in names]
        self._host, self._num_hosts = host, num_hosts
        rates = [
            sources[n][1] * (len(sources[n][0]) if fields['rates'] == 'proportional' else 1)
            for n in names
        ]
        bounds = _bounds(self._corpora, rates, fields['num_buckets'])
        rows = [int(fields['batch_tokens'] // (bound + 1)) for bound in bounds]
        sizes = [max(1, n // multiple_of) * multiple_of for n in rows]
        self.shapes = list(zip(sizes, map(int, bounds), strict=True))
        lengths = [_Lengths(corpus) for corpus in self._corpora]
        self.plan: StreamPlan | PassPlan
        quotas: tuple[int, ...] = ()
        if seed is None:
            ranges = [range(len(corpus)) for corpus in self._corpora]
            self.plan = PassPlan(lengths, bounds, sizes, ranges)
        else:
            order = Order.create([len(corpus) for corpus in self._corpora], rates, seed)
            self.plan, quotas = StreamPlan(order, lengths, bounds, sizes), order.quotas
        self.num_batches = self.plan.num_batches
        self.excluded = {n: sources[n][0].info['excluded'] for n in names}
        texts = [[n, sources[n][0].info['sha256']] for n in names]
        content = ['text', ORDER_VERSION, seed, quotas, self.shapes, texts]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def batch(self, k: int) -> Batch:
        """This host's rows of batch k."""
        members = self.plan.members(k)
        total, width = self.shapes[members.bucket]
        first = self._host * total // self._num_hosts
        size = (self._host + 1) * total // self._num_hosts - first
        mine = slice(first, first + size)
        batch: Batch = {
            'labels': np.zeros((size, width), np.int32),
            'label_counts': np.zeros(size, np.int32),
            'word_counts': np.zeros(size, np.int32),
            'rows': np.arange(first, first + size, dtype=np.int32),
            'sources': members.source[mine].astype(np.int32),
            'utterances': members.row[mine].astype(np.int32),
        }
        for place, (source, row) in enumerate(
            zip(members.source[mine], members.row[mine], strict=True)
        ):
            if source >= 0:
                tokens = self._corpora[source].tokens(int(row))
                batch['labels'][place, : tokens.size] = tokens
                batch['label_counts'][place] = tokens.size
                batch['word_counts'][place] = self._corpora[source].words[row]
        return batch

    @contextlib.contextmanager
    def batches(self, start: int = 0) -> Iterator[Iterator[Batch]]:
        """Batches start, start + 1, ...; ends after the last batch of a pass."""

        def following() -> Iterator[Batch]:
            k = start
            while self.num_batches is None or k < self.num_batches:
                yield self.batch(k)
                k += 1

        yield following()


def _bounds(corpora: list[TextCorpus], rates: list[float], num_buckets: int) -> np.ndarray:
    """Label widths of the buckets, with the least padding."""
    longest = max(
        int(corpus.lengths(np.arange(start, min(start + _BLOCK, len(corpus)))).max())
        for corpus in corpora
        for start in range(0, len(corpus), _BLOCK)
    )
    edges = np.arange(1, -(-longest // _LABEL_STEP) + 1, dtype=np.int64) * _LABEL_STEP
    counts = np.zeros(edges.size)
    for corpus, rate in zip(corpora, rates, strict=True):
        for start in range(0, len(corpus), _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, len(corpus)))
            bins = np.searchsorted(edges, corpus.lengths(rows), side='left')
            counts += np.bincount(bins, minlength=edges.size) * rate / len(corpus)
    return optimal_bounds(edges, counts, num_buckets)
