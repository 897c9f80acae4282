"""Fine-tuning of Moshi with Test-Time-Training layers: configuration, data, training loop."""
