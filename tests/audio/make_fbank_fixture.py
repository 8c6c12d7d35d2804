"""Makes fbank_fixture.npz: a small signal and Kaldi's filter banks of it.

Run once, with kaldi-native-fbank installed (`pip install kaldi-native-fbank`):
    python tests/audio/make_fbank_fixture.py
The tests read the stored file, so that they need neither Kaldi nor its wheels.
"""

import json
import pathlib

import kaldi_native_fbank
import numpy as np

PARAMETERS = [
    {},
    {'num_mels': 128},
    {'num_mels': 40, 'window': 'hann', 'low_hz': 125.0, 'high_hz': 7600.0},
    {'num_mels': 23, 'preemphasis': 0.0, 'window_ms': 32.0, 'hop_ms': 8.0},
]


def signal() -> np.ndarray:
    """int16 [6000]: a gliding tone with formants, noise, a click, near silence, an offset."""
    rng = np.random.default_rng(20)
    time = np.arange(6000) / 16000
    pitch = 2 * np.pi * np.cumsum(110 + 60 * np.sin(5 * time)) / 16000
    voiced = sum(
        np.sin(n * pitch) / n * (1 + 2 * np.exp(-(((110 * n - 700) / 300) ** 2)))
        for n in range(1, 40)
    )
    loudness = np.interp(np.arange(6000), [0, 1500, 3000, 3200, 4000, 6000], [1, 1, 1, 0, 0, 0.1])
    wave = 3000 * voiced * loudness + rng.normal(size=6000) * np.where(time < 0.2, 200, 1.5)
    wave[5000] += 20000
    return np.clip(wave + 120, -32768, 32767).astype(np.int16)


def kaldi(wave: np.ndarray, parameters: dict) -> np.ndarray:
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = {'povey': 'povey', 'hann': 'hanning'}[
        parameters.get('window', 'povey')
    ]
    options.frame_opts.preemph_coeff = parameters.get('preemphasis', 0.97)
    options.frame_opts.frame_length_ms = parameters.get('window_ms', 25.0)
    options.frame_opts.frame_shift_ms = parameters.get('hop_ms', 10.0)
    options.mel_opts.num_bins = parameters.get('num_mels', 80)
    options.mel_opts.low_freq = parameters.get('low_hz', 20.0)
    options.mel_opts.high_freq = parameters.get('high_hz', 8000.0)
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(16000, wave.astype(np.float32).tolist())
    fbank.input_finished()
    return np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])


if __name__ == '__main__':
    wave = signal()
    arrays = {f'features{i}': kaldi(wave, p) for i, p in enumerate(PARAMETERS)}
    path = pathlib.Path(__file__).with_name('fbank_fixture.npz')
    np.savez_compressed(path, wave=wave, parameters=json.dumps(PARAMETERS), **arrays)
    print(path, path.stat().st_size, 'bytes')
