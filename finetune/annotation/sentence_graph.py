"""All ways to say a text, as a finite-state grammar, and which of them was said."""

from collections.abc import Sequence
from typing import NamedTuple

from finetune.annotation.numbers import Reading


class Arc(NamedTuple):
    """One spoken token between two states; `word` is the index of the written word that it belongs to."""

    source: int
    target: int
    token: str
    word: int
    probability: float


class SentenceGraph:
    """The readings of a text's words after each other.

    Args:
        words: per written word its parts, per part its readings (see `spoken_parts`).

    Attributes:
        arcs: sorted by source; the first state is 0.
        final: the last state.
    """

    def __init__(self, words: Sequence[Sequence[Sequence[Reading]]]) -> None:
        self.arcs: list[Arc] = []
        self.final = 0
        num_states = 1
        for index, parts in enumerate(words):
            for readings in parts:
                entry, end = self.final, num_states
                num_states += 1
                for reading in readings:
                    states = [entry, *range(num_states, num_states + len(reading) - 1), end]
                    num_states += len(reading) - 1
                    for step, token in enumerate(reading):
                        share = 1.0 / len(readings) if step == 0 else 1.0
                        self.arcs.append(Arc(states[step], states[step + 1], token, index, share))
                self.final = end

    def words_of(self, tokens: Sequence[str]) -> list[int] | None:
        """Find the written word of each spoken token.

        Args:
            tokens: what was said, in order.

        Returns:
            An index per token, or None if the tokens are no complete reading of the text.
        """
        leaving: dict[int, list[Arc]] = {}
        for arc in self.arcs:
            leaving.setdefault(arc.source, []).append(arc)
        steps: list[dict[int, Arc]] = []
        states = {0}
        for token in tokens:
            arrived = {
                arc.target: arc for state in states for arc in leaving.get(state, []) if arc.token == token
            }
            steps.append(arrived)
            states = set(arrived)
        if self.final not in states:
            return None
        words, state = [], self.final
        for arrived in reversed(steps):
            words.append(arrived[state].word)
            state = arrived[state].source
        return words[::-1]
