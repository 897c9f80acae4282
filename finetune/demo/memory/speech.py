"""The sound of the dialogues: every line is spoken once, and is the same wherever it is said."""

from finetune.demo.memory.dialogues import ANSWERS, CUE, QUESTIONS, REMARKS, WORD_FRAMES, WORD_LINES
from finetune.demo.speech.dialogues import MAIN
from finetune.demo.speech.espeak import Espeak, EspeakVoice
from finetune.demo.speech.lines import Line, speak_line
from finetune.demo.speech.word_times import Speech

_MAIN_VOICE = EspeakVoice("en-us", words_per_minute=170, pitch=42)
_CODE_VOICE = EspeakVoice("en-us", words_per_minute=330, pitch=42)  # a word lasts two frames
_USER_VOICE = EspeakVoice("en-gb-x-rp+f1", words_per_minute=175, pitch=55)


def speak_lines() -> dict[Line, Speech]:
    """Speak all lines, each in whole frames; from the start of a process always the same."""
    espeak = Espeak()
    voices = {MAIN: _MAIN_VOICE}
    lines = {
        line: speak_line(espeak, line, voices.get(line.speaker, _USER_VOICE))
        for line in (CUE, *QUESTIONS, *REMARKS, *ANSWERS)
    }
    codes = {line: speak_line(espeak, line, _CODE_VOICE, num_frames=WORD_FRAMES) for line in WORD_LINES}
    return lines | codes
