"""Behaviour in conversation: waiting in pauses, taking the turn, interruptions and backchannels."""
