"""From a manifest of stereo recordings to batches of text and audio tokens."""
