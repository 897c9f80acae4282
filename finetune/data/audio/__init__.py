"""Audio files: finding, reading and checking them."""
