"""Speech codes from a synthesiser: espeak-ng's waveforms to log-mel frames at 25 Hz to the nearest of k centres.

A stand-in for a trained speech tokenizer: same rate, same form, made on any machine. Not bit-equal between versions of
espeak-ng or scikit-learn; a prepared dataset keeps its codes.
"""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ....models.errors import DataError, LaunchError

__all__ = ["encode_utterances", "espeak_version", "log_mel_frames", "speak"]

PROGRAM = "espeak-ng"
SAMPLE_RATE = 22_050
FRAMES_PER_S = 25
MEL_BANDS = 24
HEADER_BYTES = 44
VOICES = ("m1", "f1", "m3", "f2", "m5", "f3", "m7", "f4", "m2", "f5", "m4", "m6")
SPEEDS = (150, 175, 130)
PITCHES = (50, 35, 65)
QUIET = 0.01
"""Share of the loudest sample below which there is silence."""


def _program() -> str:
    found = shutil.which(PROGRAM)
    if found is None:
        raise LaunchError(
            f"builtin:spoken-digits needs the program {PROGRAM}, which is not on PATH; install it (apt-get install {PROGRAM})"
        )
    return found


def espeak_version() -> str:
    """Version of the synthesiser.

    Raises:
        LaunchError: there is none.
    """
    done = subprocess.run([_program(), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.split("Data at")[0].strip()


def speak(text: str, voice: str, speed: int, pitch: int) -> NDArray[np.float32]:
    """(N,) waveform at 22,050 Hz, from -1 to 1."""
    command = [_program(), "-v", f"en-us+{voice}", "-s", str(speed), "-p", str(pitch), "--stdout"]
    done = subprocess.run([*command, text], capture_output=True, check=False)
    if done.returncode or len(done.stdout) <= HEADER_BYTES:
        reason = done.stderr.decode(errors="replace").strip() or "no sound"
        raise DataError(f"{PROGRAM} failed to say {text!r} with voice {voice}: {reason}")
    # The header of a streamed file does not know its length.
    samples = np.frombuffer(
        done.stdout[HEADER_BYTES:], "<i2", (len(done.stdout) - HEADER_BYTES) // 2
    )
    return _without_silence(samples.astype(np.float32) / np.float32(32768))


def _without_silence(waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Without what is quiet before and after the word."""
    loud = np.flatnonzero(np.abs(waveform) > QUIET * np.abs(waveform).max(initial=0))
    return waveform[loud[0] : loud[-1] + 1] if len(loud) else waveform


def log_mel_frames(waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    """(frames, bands) log energies at 25 Hz of windows twice the step, less the utterance's mean."""
    step = SAMPLE_RATE // FRAMES_PER_S
    width = 2 * step
    padded = np.pad(waveform, (step // 2, width))
    frames = len(waveform) // step + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)[: frames * step : step]
    power = np.abs(np.fft.rfft(windows * np.hanning(width), axis=1)) ** 2
    energies = np.log(power @ _mel_filters(width).T + 1e-6)
    return (energies - energies.mean()).astype(np.float32)


def _mel_filters(width: int) -> NDArray[np.float64]:
    """(bands, width // 2 + 1) triangles that are even on the mel scale."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, MEL_BANDS + 2) / 2595) - 1)
    bins = np.arange(width // 2 + 1) * (SAMPLE_RATE / width)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return np.clip(np.minimum(rising, falling), 0, None)


def encode_utterances(
    texts: Sequence[str], utterances: int, codes: int
) -> tuple[list[list[NDArray[np.int64]]], bytes]:
    """Every text spoken in several ways, as codes of centres that are fitted to all of it.

    Args:
        utterances: of each text.
        codes: centres.

    Returns:
        (n,) int64 codes by text and utterance, and the centres, (codes, bands) float32, as a .npy file.

    Raises:
        DataError: fewer frames than centres.
        LaunchError: espeak-ng is missing.
    """
    import sklearn.cluster

    ways = [
        (
            text,
            VOICES[i % len(VOICES)],
            SPEEDS[i // len(VOICES) % 3],
            PITCHES[i // (3 * len(VOICES)) % 3],
        )
        for text in texts
        for i in range(utterances)
    ]
    with ThreadPoolExecutor() as pool:
        frames = [log_mel_frames(wave) for wave in pool.map(lambda way: speak(*way), ways)]
    together = np.concatenate(frames)
    if len(together) < 2 * codes:
        raise DataError(
            f"data.interleaved.speech.codes: {codes} for {len(together)} frames of speech; ask for fewer codes or more utterances "
            "(builtin:spoken-digits:utterances=80)"
        )
    model = sklearn.cluster.KMeans(codes, n_init=1, random_state=0).fit(together)
    borders = np.cumsum([len(part) for part in frames])[:-1]
    found = np.split(model.labels_.astype(np.int64), borders)
    stream = io.BytesIO()
    np.save(stream, model.cluster_centers_.astype(np.float32))
    by_text = [found[i * utterances : (i + 1) * utterances] for i in range(len(texts))]
    return by_text, stream.getvalue()
