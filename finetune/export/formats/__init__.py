"""Weights under the names of other libraries: Hugging Face transformers and PEFT."""
