"""Order by arithmetic: which row of which source stands at position i of an endless stream.

Nothing is shuffled in memory and nothing is remembered. Row order is a *computed* permutation, so
a stream over a billion rows costs as much memory as one over ten, and any position can be asked
for first. The stream is cut into segments of S positions:

    position      0 ................ S-1 | S ............. 2S-1 | ...
    segment              g = 0           |        g = 1         |
    source        a b a a c a b ...        every segment holds exactly q_a, q_b, q_c positions
                                           of each source, in an order drawn for that segment

Source s has n_s rows and its draws are numbered through all segments: draw j of segment g is
p = g * q_s + j, so epoch = p // n_s, and row = permute(p mod n_s, n_s, key(seed, s, epoch)).
Every row of a source therefore comes exactly once per epoch of that source, whatever the rates.

`permute` is a Feistel network on the smallest power of two >= n, walked until it falls below n
("cycle-walking", Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"); its round function
is the finaliser of splitmix64 (Steele, Lea & Flood 2014). numpy's own permutation may change
between versions; this one is fully specified here and held by golden values in the tests. Sources
take turns within a segment by the same permutation over its S positions.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bigssl_jax.data.errors import DataError

SEGMENT_SIZE = 1 << 16
ORDER_VERSION = 1  # part of every stream's fingerprint: raise it if any arithmetic here changes

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)
# A constant per round of the network: multiples of one of the odd constants above, modulo 2**64.
_ROUNDS = tuple(np.uint64(r * int(_MIX_A) % (1 << 64)) for r in range(6))
_INTERLEAVE = 0x696E7465726C6561  # the word of the key that no source number can equal


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The value after one step of splitmix64 from each state; uint64 in and out, modulo 2**64."""
    z = x + _GOLDEN
    z = (z ^ (z >> _S30)) * _MIX_A
    z = (z ^ (z >> _S27)) * _MIX_B
    return z ^ (z >> _S31)


def derive_key(*words: int | np.ndarray) -> np.ndarray:
    """One uint64 key (or an array of keys) from integers: key = mix(mix(...) ^ word), in order."""
    key: np.ndarray = np.zeros(1, np.uint64)
    for word in words:
        word = np.asarray(word)
        if word.dtype != np.uint64:
            word = word.astype(np.int64).astype(np.uint64)
        key = splitmix64(key ^ word)
    return key


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of range(size) sends each index.

    Args:
      index: integers in [0, size), any shape [N].
      size: how many elements are permuted, 1 <= size <= 2**62.
      key: uint64 [1] or [N] from `derive_key`; elements with equal keys share one permutation.

    Returns:
      int64 [N]; for a fixed key a bijection of range(size).
    """
    if size < 1:
        raise ValueError(f'permute needs size >= 1, got {size}')
    value = np.asarray(index).astype(np.uint64)
    if size == 1:
        return np.zeros(value.shape, np.int64)
    key = np.broadcast_to(key, value.shape)
    bits = int(size - 1).bit_length()
    value = _feistel(value, bits, key)
    # The domain is below 2 * size, so fewer than half of the values are outside: few, short walks.
    outside = np.flatnonzero(value >= np.uint64(size))
    while outside.size:
        walked = _feistel(value[outside], bits, key[outside])
        value[outside] = walked
        outside = outside[walked >= np.uint64(size)]
    return value.astype(np.int64)


def _feistel(value: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    """A permutation of [0, 2**bits): halves of bits//2 and the rest, each mixed by the other."""
    low_bits = np.uint64(bits - bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(bits // 2)) - np.uint64(1)
    high, low = value >> low_bits, value & low_mask
    for number, constant in enumerate(_ROUNDS):
        round_key = key + constant
        if number % 2 == 0:
            high = high ^ (splitmix64(low + round_key) & high_mask)
        else:
            low = low ^ (splitmix64(high + round_key) & low_mask)
    return (high << low_bits) | low


def exact_quotas(rates: Sequence[float], segment_size: int) -> np.ndarray:
    """Positions per segment for each source: floor(rate * S), the rest by largest remainder.

    Args:
      rates: non-negative shares, any scale.
      segment_size: S.

    Returns:
      int64 [sources], summing to S.

    Raises:
      DataError: a rate is not positive, or so small that its source would never be drawn.
    """
    wanted = np.asarray(rates, np.float64)
    if wanted.size == 0 or not np.all(np.isfinite(wanted)) or np.any(wanted <= 0):
        raise DataError(f'weights must be positive numbers, got {wanted.tolist()}')
    shares = wanted / wanted.sum() * segment_size
    quotas = np.floor(shares).astype(np.int64)
    missing = segment_size - int(quotas.sum())
    by_remainder = np.argsort(-(shares - quotas), kind='stable')
    quotas[by_remainder[:missing]] += 1
    if np.any(quotas == 0):
        worst = int(np.argmin(wanted))
        raise DataError(
            f'source {worst} has a share of {wanted[worst] / wanted.sum():.2e}, below one position'
            f' in a segment of {segment_size}: raise its weight, or join it with another source'
        )
    return quotas


class Segment(NamedTuple):
    """The S positions of one segment, in stream order: three arrays [S]."""

    source: np.ndarray  # int32
    row: np.ndarray  # int64, row within the source's selection
    epoch: np.ndarray  # int64


@dataclasses.dataclass(frozen=True)
class Order:
    """An endless order over sources of `sizes` rows, drawn with `quotas` per segment."""

    sizes: tuple[int, ...]
    quotas: tuple[int, ...]
    seed: int

    @classmethod
    def create(
        cls,
        sizes: Sequence[int],
        rates: Sequence[float],
        seed: int,
        segment_size: int = SEGMENT_SIZE,
    ) -> 'Order':
        """An order with exact quotas from rates. Raises DataError on an empty source."""
        for number, size in enumerate(sizes):
            if size < 1:
                raise DataError(f'source {number} has no rows: loosen its selection')
        quotas = exact_quotas(rates, segment_size)
        return cls(tuple(int(n) for n in sizes), tuple(int(q) for q in quotas), int(seed))

    @property
    def segment_size(self) -> int:
        return sum(self.quotas)

    def source_rows(self, source: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row [N], epoch [N]) of the given draw numbers of one source."""
        epoch, place = np.divmod(np.asarray(draws, np.int64), self.sizes[source])
        if epoch.size and epoch[0] == epoch[-1] and epoch.min() == epoch.max():
            key = derive_key(self.seed, source, epoch[:1])
        else:
            first = int(epoch.min()) if epoch.size else 0
            count = int(epoch.max()) - first + 1 if epoch.size else 0
            keys = derive_key(self.seed, source, np.arange(first, first + count))
            key = keys[epoch - first]
        return permute(place, self.sizes[source], key), epoch

    def interleave(self, segment: int) -> np.ndarray:
        """Which source stands at each position of a segment: int32 [S], source s q_s times."""
        if len(self.sizes) == 1:
            return np.zeros(self.segment_size, np.int32)
        key = derive_key(self.seed, _INTERLEAVE, segment)
        ticket = permute(np.arange(self.segment_size), self.segment_size, key)
        return np.searchsorted(np.cumsum(self.quotas), ticket, side='right').astype(np.int32)

    def segment(self, number: int) -> Segment:
        """All positions of one segment. Cost is O(S), independent of how large the sources are."""
        source = self.interleave(number)
        row: np.ndarray = np.empty(self.segment_size, np.int64)
        epoch: np.ndarray = np.empty(self.segment_size, np.int64)
        # Draws of one source keep their own order in the stream: an epoch ends before the next.
        positions = np.argsort(source, kind='stable')
        start = 0
        for index, quota in enumerate(self.quotas):
            place = positions[start : start + quota]
            row[place], epoch[place] = self.source_rows(index, number * quota + np.arange(quota))
            start += quota
        return Segment(source, row, epoch)

    def locate(self, position: int) -> tuple[int, int, int]:
        """(source, row, epoch) at one position of the stream."""
        number, place = divmod(int(position), self.segment_size)
        segment = self.segment(number)
        return int(segment.source[place]), int(segment.row[place]), int(segment.epoch[place])
