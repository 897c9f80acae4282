"""What the memory gives: one fine-tuning with TTT and without. `python -m finetune.demo.memory`."""
