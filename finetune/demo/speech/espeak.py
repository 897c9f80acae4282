"""The espeak-ng synthesiser, driven through its C interface (`espeak-ng/speak_lib.h`)."""

import ctypes
from dataclasses import dataclass

import numpy as np

from finetune.errors import UserError

_EVENT_LIST_TERMINATED, _EVENT_WORD = 0, 1
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_POS_CHARACTER = 1
_CHARS_UTF8 = 1
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@dataclass(frozen=True)
class EspeakVoice:
    """A way to speak.

    Attributes:
        name: an espeak-ng voice, with an optional variant after a plus sign: `en-us`, `en-us+f3`.
        words_per_minute: speed, 80 to 450.
        pitch: 0 to 100, 50 is the voice's own.
    """

    name: str
    words_per_minute: int
    pitch: int


@dataclass(frozen=True)
class WordEvent:
    """The start of a spoken word.

    Attributes:
        char: index into the text of the word's first character. Mind that espeak-ng speaks some pairs
            ("on the") as one word, and splits numbers.
        start_sec: time from the start of the samples.
    """

    char: int
    start_sec: float


def find_espeak() -> tuple[str, str]:
    """The paths of the shared library and of its data directory.

    Raises:
        UserError: the package that brings espeak-ng is not installed.
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise UserError(
            "the demo speaks with espeak-ng, which is not installed: pip install 'moshi-ttt[demo]'"
        ) from error
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


class Espeak:
    """A synthesiser.

    Its noise and flutter generators are static variables of the library that nothing resets, so audio is
    reproducible only from the start of a process: the same calls in the same order.

    Attributes:
        sample_rate: of the samples that it returns, in Hz.
    """

    def __init__(self) -> None:
        library_path, data_path = find_espeak()
        self._library = ctypes.CDLL(library_path)
        self._library.espeak_Synth.argtypes = (
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int,
            ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
        )  # fmt: skip
        self.sample_rate = self._library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path.encode(), 0
        )
        if self.sample_rate <= 0:
            raise UserError(f"espeak-ng cannot start with the data in {data_path}.")
        self._samples: list[np.ndarray] = []
        self._events: list[WordEvent] = []
        self._callback = _Callback(self._receive)  # the library keeps a pointer: it must stay alive
        self._library.espeak_SetSynthCallback(self._callback)

    def say(self, text: str, voice: EspeakVoice) -> tuple[np.ndarray, list[WordEvent]]:
        """Speak a text.

        Args:
            text: ASCII.
            voice: how to speak it.

        Returns:
            Samples [num_samples], float32 in -1..1 at `sample_rate`, and the words in order of time.

        Raises:
            UserError: the voice does not exist.
        """
        self._samples, self._events = [], []
        if self._library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {voice.name!r}.")
        self._library.espeak_SetParameter(_PARAMETER_RATE, voice.words_per_minute, 0)
        self._library.espeak_SetParameter(_PARAMETER_PITCH, voice.pitch, 0)
        data = text.encode("ascii")
        status = self._library.espeak_Synth(
            data, len(data) + 1, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        if status != 0 or not self._samples:
            raise UserError(f"espeak-ng failed with status {status} on {text!r}.")
        samples = np.concatenate(self._samples).astype(np.float32) / 32768.0
        return samples, sorted(self._events, key=lambda event: event.start_sec)

    def _receive(
        self, samples: "ctypes._Pointer[ctypes.c_short]", num_samples: int, events: "ctypes._Pointer[_Event]"
    ) -> int:
        if samples and num_samples > 0:
            self._samples.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        index = 0
        while events[index].type != _EVENT_LIST_TERMINATED:
            event = events[index]
            if event.type == _EVENT_WORD:
                self._events.append(WordEvent(event.text_position - 1, event.audio_position / 1000))
            index += 1
        return 0  # 1 would stop the synthesis
