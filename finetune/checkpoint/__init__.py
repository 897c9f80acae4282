"""What a checkpoint is: written, read, and resumed from."""
