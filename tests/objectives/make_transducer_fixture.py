"""Makes transducer_torchaudio.npz: losses and gradients of torchaudio's rnnt_loss.

    python tests/objectives/make_transducer_fixture.py

in an environment of its own with torch 2.11, torchaudio 2.11 and numpy.
"""

import pathlib

import numpy as np
import torch
from torchaudio.functional import rnnt_loss

TARGET = pathlib.Path(__file__).with_name('transducer_torchaudio.npz')


def case(rows, frames, labels, vocabulary, blank, scale, seed):
    """Ragged rows; the first has all frames and labels."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(rows, frames, labels + 1, vocabulary)).astype(np.float32) * scale
    frame_counts = random.integers(1, frames + 1, rows).astype(np.int32)
    label_counts = random.integers(0, labels + 1, rows).astype(np.int32)
    frame_counts[0], label_counts[0] = frames, labels
    wanted = random.integers(0, vocabulary - 1, (rows, labels)).astype(np.int32)
    wanted += wanted >= blank
    leaf = torch.tensor(logits, requires_grad=True)
    losses = rnnt_loss(
        leaf,
        torch.tensor(wanted),
        torch.tensor(frame_counts),
        torch.tensor(label_counts),
        blank=blank,
        reduction='none',
    )
    losses.sum().backward()
    return {
        'logits': logits,
        'labels': wanted,
        'frame_counts': frame_counts,
        'label_counts': label_counts,
        'blank': np.int32(blank),
        'losses': losses.detach().numpy(),
        'gradient': leaf.grad.numpy(),
    }


def main():
    cases = {
        'first': case(4, 7, 5, 6, blank=0, scale=1.0, seed=0),
        'long': case(2, 60, 12, 4, blank=3, scale=2.0, seed=1),
        'extreme': case(4, 7, 5, 6, blank=0, scale=50.0, seed=2),
    }
    np.savez_compressed(
        TARGET,
        **{
            f'{name}/{key}': value
            for name, arrays in cases.items()
            for key, value in arrays.items()
        },
    )


if __name__ == '__main__':
    main()
