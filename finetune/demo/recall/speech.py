"""The sound of all lines, each spoken once."""

from finetune.demo.memory.dialogues import ANSWERS, REMARKS
from finetune.demo.recall.dialogues import WORD_FRAMES
from finetune.demo.recall.plants import other_lines, word_lines
from finetune.demo.speech.dialogues import MAIN, USER
from finetune.demo.speech.espeak import Espeak, EspeakVoice
from finetune.demo.speech.lines import Line, speak_line
from finetune.demo.speech.word_times import Speech

_VOICES = {
    MAIN: EspeakVoice("en-us", words_per_minute=170, pitch=42),
    USER: EspeakVoice("en-gb-x-rp+f1", words_per_minute=175, pitch=55),
}
_FAST_VOICES = {  # a word of a plant lasts two frames
    MAIN: EspeakVoice("en-us", words_per_minute=330, pitch=42),
    USER: EspeakVoice("en-gb-x-rp+f1", words_per_minute=330, pitch=55),
}


def speak_lines() -> dict[Line, Speech]:
    """Speak all lines, each in whole frames; from the start of a process always the same."""
    espeak = Espeak()
    lines = {
        line: speak_line(espeak, line, _VOICES[line.speaker]) for line in (*REMARKS, *ANSWERS, *other_lines())
    }
    words = {
        line: speak_line(espeak, line, _FAST_VOICES[line.speaker], num_frames=WORD_FRAMES)
        for line in word_lines()
    }
    return lines | words
