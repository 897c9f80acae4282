"""One outer rate for all weights against three, on the quickstart's tiny model."""
