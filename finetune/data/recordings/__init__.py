"""From manifests to the list of recordings."""
