"""What a speech-to-text model hears wrongly, and when in a recording."""
