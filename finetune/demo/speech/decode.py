"""Sound in the formats of packages, decoded by PyAV."""

import io

import numpy as np

from finetune.errors import DataError, UserError


def decode_sound(data: bytes, *, file_format: str | None = None) -> tuple[np.ndarray, int]:
    """Samples [num_samples], float32 in -1..1, the mean of all channels, and their rate in Hz.

    Args:
        data: a whole file.
        file_format: FFmpeg's name of it, for a file that does not say itself what it is.

    Raises:
        UserError: PyAV is not installed.
        DataError: the data cannot be decoded; one line.
    """
    try:
        import av
    except ImportError as error:
        raise UserError("PyAV is not installed: pip install 'moshi-ttt[prompts]'") from error
    try:
        with av.open(io.BytesIO(data), "r", format=file_format) as container:
            if not container.streams.audio:
                raise DataError("holds no sound.")
            rate = container.streams.audio[0].rate
            resampler = av.AudioResampler(format="fltp")
            frames = [
                part.to_ndarray()
                for frame in (*container.decode(audio=0), None)
                for part in resampler.resample(frame)
            ]
    except av.FFmpegError as error:
        raise DataError(f"cannot be decoded ({error.strerror}).") from error
    if not frames:
        raise DataError("holds no sound.")
    return np.concatenate(frames, axis=1).mean(axis=0, dtype=np.float32), rate
